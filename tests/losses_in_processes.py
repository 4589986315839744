"Losses of half a batch in one of two processes, written to a file; called by test_parity_losses.py"
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tokkit.training import LeCAM, adaptive_weight, contrastive_loss

recorded = sys.argv[1]
folder = sys.argv[2]
rank = int(sys.argv[3])
dist.init_process_group('gloo', f'file://{folder}/meet', timeout=timedelta(seconds=60), rank=rank,
                        world_size=2)
r = load_file(recorded)
z_s, z_q = (r[f's1.{k}'][4*rank:4*rank+4].clone().requires_grad_() for k in ('z_s', 'z_q'))
loss = contrastive_loss(z_s, z_q)
g_s, g_q = torch.autograd.grad(loss, (z_s, z_q))
lecam = LeCAM(.9)
w = torch.ones(16, requires_grad=True)
lecam(z_q, z_s)
losses = (z_q.detach()*w).square().mean(), (z_s.detach()*w).mean()
apart, together = (adaptive_weight(*losses, w, synchronize=s) for s in (False, True))
torch.save(dict(loss=loss.detach(), grad_z_s=g_s, grad_z_q=g_q, real=lecam.real, fake=lecam.fake, apart=apart,
                together=together), f'{folder}/{rank}.pt')
dist.destroy_process_group()
