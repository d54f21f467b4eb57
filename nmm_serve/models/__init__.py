from nmm_serve.models.nmm import NMMForConditionalGeneration, NMMModel, NMMOutput

__all__ = ["NMMForConditionalGeneration", "NMMModel", "NMMOutput"]
