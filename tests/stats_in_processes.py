"Statistics of a part of the features in one of two processes, written to a file; called by test_metrics.py"
import sys
from datetime import timedelta

import numpy as np
import torch.distributed as dist

from tokkit.features import FeatureStats, across_processes

folder = sys.argv[1]
rank = int(sys.argv[2])
dist.init_process_group('gloo', f'file://{folder}/meet', timeout=timedelta(seconds=60), rank=rank,
                        world_size=2)
f = np.random.default_rng(0).normal(size=(1500, 30))*10+100
both = across_processes(FeatureStats.from_features(f[:1100] if rank else f[1100:], 'mine'))
# the other had no images
one = across_processes(None if rank else FeatureStats.from_features(f[:400], 'mine'))
refused = ''
try: across_processes(FeatureStats.from_features(f, f'extractor {rank}'))
except ValueError as e: refused = str(e)
np.savez(f'{folder}/{rank}.npz', refused=refused, extractor=both.extractor,
         **{f'{name}_{k}': getattr(s, k) for name, s in (('both', both), ('one', one))
            for k in ('n', 'mean', 'cov')})
dist.destroy_process_group()
