"""Starting points other than scratch: parts of a new model from local Hugging Face directories."""
