"A quantizer that behaves as if it were on another device"
from tokkit.quantizers import VectorQuantizer


class Away(VectorQuantizer):
    "As if on a GPU once `here` is False: nothing of it can be had before `cpu()`, and only a copy is brought"
    here = True
    def cpu(self):
        self.here = True
        return super().cpu()
    def __getattribute__(self, name):
        if name in ('codebook', 'usage', 'codes', 'neighbours') and not object.__getattribute__(self, 'here'):
            raise RuntimeError('ids and codes on two devices')
        return super().__getattribute__(name)
