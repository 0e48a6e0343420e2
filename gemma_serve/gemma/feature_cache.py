"""Features of images seen lately, so that the vision tower need not look again."""

from collections import OrderedDict

from torch import Tensor


class FeatureCache:
    """Tensors by the digest of what they show, within a budget; the least recently used one goes.

    A chat sends its images again with every turn, and popular images come from many users. Used by
    the engine thread.
    """

    def __init__(self, max_bytes: int) -> None:
        """``max_bytes``: of tensors; 0 keeps none."""
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        return self._num_bytes

    def get(self, digest: bytes) -> Tensor | None:
        """What was put under ``digest``, for reading only, unless it had to go."""
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: Tensor) -> None:
        """Keep ``features``, which must own their memory, unless they alone are too large."""
        if digest in self._features or features.nbytes > self._max_bytes:
            return
        while self._num_bytes + features.nbytes > self._max_bytes:
            _, oldest = self._features.popitem(last=False)
            self._num_bytes -= oldest.nbytes
        self._features[digest] = features
        self._num_bytes += features.nbytes
