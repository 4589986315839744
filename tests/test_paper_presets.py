"The presets of the paper against the recorded settings of the released code, and ten steps at full shape"
import json, math

import pytest
import torch

from tokkit.core import save_tensors
from tokkit.recipes import follow_tokenizer, for_images, preset, RECIPES, with_changes
from tokkit.training import rate_schedule

MAIN, POST = preset('paper-main'), preset('paper-post-released')
# settings that decide no number here: places, logging, other options of the same switch, and what is off
ELSEWHERE = set("""
    data_path data_face_path cloud_save_path no_local_save vq_model vq_ckpt finetune results_dir
    dataset num_workers log_every vis_every ckpt_every save_best val_data_path sample_folder_dir
    pair_set config reconstruction_folder_dir debug_disc global_seed product_quant share_quant_resi
    codebook_drop half_sem start_drop detail_guide detail_loss_weight detail_loss_scale guide_type_2
    clip_norm lfq entropy_loss_ratio codebook_weight norm_type aug_fade_steps disc_reinit disc_start
    enc_tuning_method dec_tuning_method dropout_p ema gen_loss
    """.split())


def told(tokenizer, training, perturbation, scale:float) -> dict:
    "Our settings under the released code's names; `scale` is what its script multiplies learning rates with"
    t, opponent = training, training.discriminator_training
    damage = dict(alpha=1., beta=0., delta=100, anneal_start=100, anneal_end=100, end_ratio=.5)
    if perturbation is not None:
        p, a = perturbation, perturbation.annealing
        damage = dict(alpha=p.alpha, beta=p.beta, delta=p.delta, anneal_start=a.start, anneal_end=a.end,
                      end_ratio=a.end_ratio)
    kinds = dict(robustok='dinov2')
    return damage | dict(
        codebook_size=tokenizer.codebook_size, codebook_embed_dim=tokenizer.code_dim,
        codebook_l2_norm=tokenizer.l2_norm, commit_loss_beta=tokenizer.commitment,
        image_size=tokenizer.size, num_latent_tokens=tokenizer.latents, v_patch_nums=[tokenizer.grid[0]],
        enc_type=kinds[tokenizer.kind], dec_type=kinds[tokenizer.kind],
        abs_pos_embed=tokenizer.positions == 'shared',
        encoder_model={768: 'vit_base_patch14_dinov2.lvd142m'}[tokenizer.width],
        decoder_model={768: 'vit_base_patch14_dinov2.lvd142m'}[tokenizer.width],
        reconstruction_weight=t.reconstruction, reconstruction_loss=t.reconstruction_kind,
        perceptual_weight=t.perceptual,
        disc_weight=t.adversarial, disc_epoch_start=round(t.adversarial_start*t.epochs),
        disc_type={'dino': 'dinodisc'}[t.discriminator], disc_loss=t.adversarial_kind,
        disc_adaptive_weight=t.adaptive, disc_lr=t.discriminator_lr/scale,
        disc_weight_decay=opponent.weight_decay,
        lecam_loss_weight=t.lecam, aug_prob=t.discriminator_augment,
        beta1=opponent.betas[0], beta2=opponent.betas[1],
        epochs=t.epochs, lr=t.lr/scale, global_batch_size=t.batch, weight_decay=t.weight_decay,
        lr_scheduler={'epoch': 'cosine'}[t.schedule], max_grad_norm=t.clip, mixed_precision=t.precision,
        gradient_accumulation_steps=t.accumulate, compile=bool(t.compile),
        semantic_guide=t.semantic_options['teacher'], sem_loss_weight=t.semantic,
        sem_loss_scale=t.semantic_options.get('scale', 1.), guide_type_1=t.semantic_kind)

@pytest.mark.parametrize('which, ours', [
    ('main_train_effective', told(MAIN.tokenizer, MAIN.training, MAIN.perturbation, 1024/128)),
    ('post_train_effective', told(MAIN.tokenizer, POST.training, None, 1.))])
def test_presets_are_the_released_settings(fixtures, which, ours):
    theirs = json.loads((fixtures/'effective_args.json').read_text())[which]
    unknown = set(theirs)-set(ours)-ELSEWHERE
    assert not unknown, f"neither compared nor left out: {unknown}"
    assert not set(ours)-set(theirs)
    def same(a, b): return math.isclose(a, b) if isinstance(b, float) else a == b
    wrong = {name: (value, theirs[name]) for name,value in ours.items() if not same(value, theirs[name])}
    assert not wrong, f"ours, theirs: {wrong}"

@pytest.mark.parametrize('name, recipe', [('main', MAIN), ('post', POST)])
def test_learning_rates_of_every_epoch(fixtures, name, recipe):
    recorded = json.loads((fixtures/'schedules.json').read_text())
    t = recipe.training
    opponent = t.discriminator_training.schedule_over(t.epochs, t.adversarial_start)
    for who,rate,lr in (('gen', rate_schedule(t), t.lr), ('disc', opponent, t.discriminator_lr)):
        ours = [lr*rate(epoch/t.epochs) for epoch in range(t.epochs)]
        theirs = torch.tensor(recorded[f'{name}.lr_{who}_during_epoch'])
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-6, atol=0)

def test_the_text_differs_from_the_release_where_it_says_so():
    text = preset('paper-post')
    assert text.freeze == 'all' and text.latents.source == 'reencode' and text.begin_discriminator == 'kept'
    assert text.training.lr == MAIN.training.lr/2 and text.latents.sigma == POST.latents.sigma == (.7,)

def test_generators_are_those_of_the_paper():
    from tokkit.generators import make_generator
    from tokkit.core import LatentSpec
    spec = LatentSpec((256, 64), (16, 16), codebook_size=4096)
    counts = {}
    for name in ('paper-rar-b', 'paper-rar-l'):
        with torch.device('meta'):
            gen = make_generator(RECIPES[name].generator.preset, spec, 1000, 0)
        counts[name] = sum(p.numel() for p in gen.parameters())
    assert counts == {'paper-rar-b': 265_645_312, 'paper-rar-l': 467_962_880}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Random weights of the three networks, under their names in a data folder"
    from tokkit.features import LPIPS
    from tokkit.layers import to_timm, ViT
    home = tmp_path_factory.mktemp('weights')
    torch.manual_seed(0)
    def keep(name, vit):
        save_tensors({to_timm(k): v for k,v in vit.state_dict().items()}, home/f'{name}.safetensors')
    keep('dinov2_vitb14', ViT(518, 14, 3, 768, 12, 12))
    keep('dino_vits16', ViT(224, 16, 3, 384, 12, 6, layer_scale=None))
    save_tensors(LPIPS().state_dict(), home/'lpips.safetensors')
    return home

@pytest.mark.slow
def test_ten_steps_at_full_shape(weights, tmp_path, monkeypatch):
    "Twenty pictures in batches of two; from the third step on the decoder feels the discriminator"
    import pandas as pd
    from PIL import Image
    monkeypatch.setenv('TOKKIT_DATA', str(weights))
    folder = tmp_path/'pictures'
    (folder/'one').mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    for i in range(20):
        pixels = torch.randint(0, 256, (300, 280, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder/'one'/f'{i}.png')
    recipe = with_changes(for_images(preset('paper-main'), str(folder), 256),
                          dict(training=dict(epochs=1, batch=2), perturbation=dict(beta=.5)))
    made, _ = follow_tokenizer(recipe, tmp_path/'made', 'cpu')
    history = pd.read_csv(made/'history.csv')
    terms = ['loss', 'recon', 'perceptual', 'semantic', 'adversarial', 'discriminator', 'quantizer',
             'replaced']
    assert history.step.tolist() == [10] and set(terms) <= set(history)
    assert history[terms].notna().all().all()
    assert (made/'discriminator.safetensors').is_file()
