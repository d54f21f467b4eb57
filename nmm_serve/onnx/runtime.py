"""Run an exported model: sessions, and a KV cache of slots that the decoder graph updates in place.

Legend: B rows (slots in use), T new tokens, K positions whose logits are wanted, V vocabulary, P patches, D hidden
size, L layers, S slots, G key/value heads, M context, C head size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nmm_serve.errors import CheckpointError, ConfigError, EngineError, first_line
from nmm_serve.onnx.manifest import DECODER, IMAGE, Manifest, read_manifest

INSTALL = "pip install 'nmm-serve[onnx]'"


def import_onnxruntime():
    """Raises EngineError with the command to run when ONNX Runtime is missing."""
    try:
        import onnxruntime
    except ImportError:
        raise EngineError(f"ONNX Runtime is not installed; run {INSTALL}") from None
    return onnxruntime


class Runtime:
    """An exported model in memory.

    The slots in use are always the first ones, so that a step over all of them is one contiguous batch.

    Args:
        path: directory that `nmm-serve export` wrote.
        slots: sequences that can be in the cache at once.
        threads: of one operator; default: one for each physical core.

    Raises CheckpointError for a directory that is not an exported model or does not load.
    """

    def __init__(self, path: str | Path, *, slots: int = 16, threads: int | None = None):
        if slots < 1:
            raise ConfigError(f"slots must be at least 1, not {slots}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        self.manifest: Manifest = read_manifest(path)
        self.onnxruntime = import_onnxruntime()
        self.decoder = self._session(Path(path) / DECODER, threads)
        self.front = self._session(Path(path) / IMAGE, threads)
        m = self.manifest
        shape = (slots, m.num_key_value_heads, m.context_length, m.head_dim)
        names = [f"{kind}_{i}" for i in range(m.num_layers) for kind in ("key", "value")]
        # memory is taken as it is first written to
        self.cache_SGMC = {name: np.zeros(shape, np.float32) for name in names}
        self.slots = slots
        self.length_S = np.zeros(slots, np.int32)
        """Tokens in the cache of each slot."""
        self._token_S1 = np.zeros((slots, 1), np.int64)
        self._last_S = np.zeros(slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._first = np.zeros(1, np.int64)
        self._no_images_PD = np.zeros((0, m.hidden_size), np.float32)
        self._nothing_PD = np.zeros((1, m.hidden_size), np.float32)  # an empty array has no address to bind
        self._logits_S1V = np.zeros((slots, 1, m.vocab_size), np.float32)
        self._steps: dict = {}

    def _session(self, file: Path, threads: int | None):
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            return self.onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has exceptions of its own, without a common base
            raise CheckpointError(f"{file} cannot be loaded: {first_line(error)}; export the model again") from error

    def image_tokens(self, images_HWC: Sequence[np.ndarray]) -> np.ndarray | None:
        """uint8 pixels of images, each cut into whole patches, to image tokens [P, D]; None for no images."""
        tokens = [self.front.run(None, {"pixels": pixels_HWC})[0] for pixels_HWC in images_HWC]
        return np.concatenate(tokens) if tokens else None

    def prefill(
        self, slot: int, token_ids: Sequence[int], image_PD: np.ndarray | None, wanted: Sequence[int]
    ) -> np.ndarray:
        """Append tokens to a slot's sequence and return the logits at the positions `wanted` among them. [K, V]

        Args:
            image_PD: a row for each image placeholder in `token_ids`; an image is never split between calls.
        """
        past, new = int(self.length_S[slot]), len(token_ids)
        assert 0 < new <= self.manifest.context_length - past
        arrays: dict[str, np.ndarray] = {
            "input_ids": np.array([token_ids], np.int64),
            "image_embeds": self._no_images_PD if image_PD is None else image_PD,
            "seqlens_k": np.array([past + new - 1], np.int32),
            "total_len": np.array(past + new, np.int32),
            "logits_index": np.array(wanted, np.int64),
        }
        logits_1KV = np.empty((1, len(wanted), self.manifest.vocab_size), np.float32)
        self.decoder.run_with_iobinding(self._bind(arrays, logits_1KV, slot, 1))
        self.length_S[slot] = past + new
        return logits_1KV[0]

    def decode(self, token_B: Sequence[int]) -> np.ndarray:
        """Append one token to each of the first B slots and return the next ones' logits. [B, V]

        The array is overwritten by the next call.
        """
        B = len(token_B)
        assert int(self.length_S[:B].max()) < self.manifest.context_length
        self._token_S1[:B, 0] = token_B
        self._last_S[:B] = self.length_S[:B]
        self._total[...] = int(self.length_S[:B].max()) + 1
        if B not in self._steps:
            arrays: dict[str, np.ndarray] = {
                "input_ids": self._token_S1[:B],
                "image_embeds": self._nothing_PD,
                "seqlens_k": self._last_S[:B],
                "total_len": self._total,
                "logits_index": self._first,
            }
            self._steps[B] = self._bind(arrays, self._logits_S1V[:B], 0, B)
        self.decoder.run_with_iobinding(self._steps[B])
        self.length_S[:B] += 1
        return self._logits_S1V[:B, 0]

    def _bind(self, arrays: dict[str, np.ndarray], logits_BKV: np.ndarray, slot: int, count: int):
        """Bind inputs, and the cache of `count` slots from `slot` on as both past and present: updated in place."""
        binding = self.decoder.io_binding()
        for name, array in arrays.items():
            if array.size:
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            else:
                binding.bind_cpu_input(name, array)
        for name, cache in self.cache_SGMC.items():
            part = cache[slot : slot + count]
            binding.bind_input(f"past_{name}", "cpu", 0, np.float32, part.shape, part.ctypes.data)
            binding.bind_output(f"present_{name}", "cpu", 0, np.float32, part.shape, part.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits_BKV.shape, logits_BKV.ctypes.data)
        return binding

    def clear(self, slot: int) -> None:
        """Forget a slot's sequence."""
        self.length_S[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Move a sequence into another slot."""
        length = int(self.length_S[source])
        for cache in self.cache_SGMC.values():
            cache[target, :, :length] = cache[source, :, :length]
        self.length_S[target], self.length_S[source] = length, 0
