"""The peer's side of compare.py: PyTorch, and DiffSynth-Studio's own loss, transformer and autoencoder, on this CPU.

usage: peer.py export DIR               weights and inputs for both sides
       peer.py WORK DIR [options]       one measurement; the last line printed is JSON

works: distill, family, mmdit-train, mmdit-forward, vae-encode, vae-decode, generate
"""
import argparse, json, os, sys, time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("work")
parser.add_argument("folder")
parser.add_argument("--full", action="store_true", help="distill: all weights instead of adapters")
parser.add_argument("--checkpointing", action="store_true", help="distill: recompute each block in the backward pass")
parser.add_argument("--steps", type=int, default=8, help="measured steps")
parser.add_argument("--warmup", type=int, default=2, help="steps before them")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--model", help="generate and family: model folder")
parser.add_argument("--family", help="family: its name in goldens/make/family_train.py")
parser.add_argument("--output", help="generate: the picture")
args = parser.parse_args()

os.environ["OMP_NUM_THREADS"] = str(args.threads)
GOLDENS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "goldens", "make")
sys.path.insert(0, GOLDENS)

from common import gen, healthy_init, save_tensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

torch.set_num_threads(args.threads)

# Direct distillation: 6 layers, 6 heads of 64, 256 image and 64 text tokens, batch 1.
TRANSFORMER = dict(num_attention_heads=6, attention_head_dim=64, num_layers=6, joint_attention_dim=384,
                   axes_dims_rope=[8, 28, 28], in_channels=64, out_channels=16, patch_size=2)
TARGETS = ("to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out "
           "img_mlp.net.2 img_mod.1 txt_mlp.net.2 txt_mod.1").split()
RANK, STUDENT_STEPS, SEED, SIDE = 8, 4, 2, 256
VAE = dict(base_dim=32, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], dropout=0.0,
           temperal_downsample=[False, True, True], input_channels=3)


def measured(work, warmup=args.warmup, steps=args.steps):
    """Seconds of each call after the warm-up."""
    for _ in range(warmup):
        work()
    secs = []
    for _ in range(steps):
        start = time.perf_counter()
        work()
        secs.append(time.perf_counter() - start)
    return secs


def report(**found):
    print(json.dumps(found), flush=True)


# --- direct distillation ---------------------------------------------------------------------------------------------

def transformer():
    import ds_tiny
    small = lambda n, p, z: 0.3 * z / p.shape[1] ** 0.5
    return healthy_init(ds_tiny.TinyDiT(TRANSFORMER), 1, rules=[("_mod.1.weight", small)])


def distillation_inputs():
    generator = gen(SEED)
    shapes = dict(latents=(1, 16, 32, 32), input_latents=(1, 16, 32, 32), prompt_emb=(1, 64, 384))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def adapt(dit):
    """Adapters as the peer injects them; their first halves are drawn so that both sides start alike."""
    from peft import LoraConfig, inject_adapter_in_model
    dit.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), dit)
    generator = gen(3)
    with torch.no_grad():
        for name, parameter in sorted(dit.named_parameters()):
            if ".lora_A." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)


def distill():
    from diffsynth.diffusion import DirectDistillLoss, FlowMatchScheduler
    from diffsynth.diffusion.base_pipeline import BasePipeline
    from diffsynth.pipelines.qwen_image import model_fn_qwen_image
    pipe = BasePipeline(device="cpu", torch_dtype=torch.float32)
    pipe.scheduler, pipe.in_iteration_models, pipe.model_fn = FlowMatchScheduler("Qwen-Image"), ("dit",), model_fn_qwen_image
    pipe.dit = transformer()
    if not args.full:
        adapt(pipe.dit)
    pipe.dit.train()
    inputs = dict(distillation_inputs(), prompt_emb_mask=torch.ones((1, 64), dtype=torch.long), height=SIDE, width=SIDE,
                  num_inference_steps=STUDENT_STEPS, use_gradient_checkpointing=args.checkpointing,
                  use_gradient_checkpointing_offload=False)
    learning = [p for p in pipe.dit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=0.01)
    losses = []

    def step():
        loss = DirectDistillLoss(pipe, **inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    report(secs=measured(step), losses=losses)


def export_distillation(folder):
    dit = transformer()
    os.makedirs(f"{folder}/transformer")
    weights = {name: value.clone() for name, value in dit.state_dict().items()}
    save_file(weights, f"{folder}/transformer/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = dict(TRANSFORMER, _class_name="QwenImageTransformer2DModel", guidance_embeds=False)
    json.dump(config, open(f"{folder}/transformer/config.json", "w"), indent=2)
    adapt(dit)
    lora = {name: value for name, value in dit.state_dict().items() if ".lora_" in name}
    save_tensors(f"{folder}/lora.safetensors", lora)
    inputs = distillation_inputs()
    for steps in (STUDENT_STEPS, 4 * STUDENT_STEPS):
        export_rows(f"{folder}/data{steps}", inputs, steps)


def export_rows(folder, inputs, steps):
    """One row as `fewstep train --task direct_distill:data_process` leaves it. Its noise is that of the seed."""
    os.makedirs(folder)
    save_tensors(f"{folder}/latents.safetensors", {"00000000": inputs["input_latents"][0]})
    text = inputs["prompt_emb"][0]
    save_tensors(f"{folder}/text.safetensors", {"00000000": text[:1], "00000001": text})
    row = dict(latents=0, prompt=1, height=SIDE, width=SIDE, seed=SEED, rand_device="cpu", num_inference_steps=steps,
               cfg_scale=1.0)
    json.dump(dict(version="", task="direct_distill", model="", model_hash="", recipe='dtype = "f32"',
                   prompts=["", "a prompt"], rows=[row]), open(f"{folder}/processed.json", "w"), indent=1)


# --- direct distillation of the goldens' small models of every family, LoRA -----------------------------------------

FAMILY_RANK = 4


def family():
    """DiffSynth-Studio's loss on a family's model, as its goldens were made."""
    import family_train
    from diffsynth.diffusion import DirectDistillLoss
    pipe, clean, noise = family_train.adapter(args.family, args.model, "open")
    noisy = pipe.scheduler.add_noise(clean, noise, torch.tensor([999.0])) if args.family in ("sd15", "sdxl") else noise
    pipe.dit.requires_grad_(False)
    from peft import LoraConfig, inject_adapter_in_model
    inject_adapter_in_model(LoraConfig(r=FAMILY_RANK, lora_alpha=FAMILY_RANK, target_modules=family_train.LORA[args.family]), pipe.dit)
    _, unknown = pipe.dit.load_state_dict(load_file(os.path.join(args.model, "..", "lora_init.safetensors")), strict=False)
    assert not unknown, unknown
    learning = [p for p in pipe.dit.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.01), []

    def step():
        loss = DirectDistillLoss(pipe, latents=noisy, input_latents=clean, num_inference_steps=STUDENT_STEPS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    report(secs=measured(step), losses=losses)


# --- a plain double-stream transformer, batch 8 ----------------------------------------------------------------------

BLOCKS, WIDTH, HEADS, HEAD, BATCH, IMAGE, TEXT, CHANNELS, TEXT_WIDTH, TIME = 6, 384, 6, 64, 8, 256, 64, 64, 512, 256


def rms(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def norm(x):
    return F.layer_norm(x, (x.shape[-1],), None, None, 1e-6)


def rotate(x, cos, sin):
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1).flatten(-2)


class Stream(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.mod, self.qkv, self.proj = linear(WIDTH, 6 * WIDTH), linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.norm_q, self.norm_k = (torch.nn.Parameter(torch.ones(HEAD)) for _ in range(2))
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def before(self, x, time):
        shift, scale, *rest = self.mod(time)[:, None].chunk(6, -1)
        qkv = self.qkv(norm(x) * (1 + scale) + shift).reshape(*x.shape[:2], 3, HEADS, HEAD)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return rms(query, self.norm_q), rms(key, self.norm_k), value, rest

    def after(self, x, attended, modulation):
        gate, shift, scale, mlp_gate = modulation
        x = x + gate * self.proj(attended)
        return x + mlp_gate * self.down(F.gelu(self.up(norm(x) * (1 + scale) + shift), approximate="tanh"))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = Stream(), Stream()

    def forward(self, image, text, time, cos, sin):
        image_qkv, text_qkv = self.image.before(image, time), self.text.before(text, time)
        query, key, value = (torch.cat([text_qkv[part], image_qkv[part]], 2) for part in range(3))
        joint = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
        joint = joint.transpose(1, 2).flatten(2)
        text_tokens = text.shape[1]
        return (self.image.after(image, joint[:, text_tokens:], image_qkv[3]),
                self.text.after(text, joint[:, :text_tokens], text_qkv[3]))


class Mmdit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.image_in, self.text_in = linear(CHANNELS, WIDTH), linear(TEXT_WIDTH, WIDTH)
        self.time_1, self.time_2 = linear(TIME, WIDTH), linear(WIDTH, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm_out, self.out = linear(WIDTH, 2 * WIDTH), linear(WIDTH, CHANNELS)

    def forward(self, image, text, time, cos, sin):
        time = F.silu(self.time_2(F.silu(self.time_1(time))))
        image, text = self.image_in(image), self.text_in(text)
        for block in self.blocks:
            image, text = block(image, text, time, cos, sin)
        shift, scale = self.norm_out(time)[:, None].chunk(2, -1)
        return self.out(norm(image) * (1 + scale) + shift)


def export_mmdit(folder):
    model = healthy_init(Mmdit(), 11, rules=[("mod.weight", lambda n, p, z: 0.3 * z / p.shape[1] ** 0.5)])
    save_tensors(f"{folder}/mmdit.safetensors", dict(model.named_parameters()))
    generator = gen(12)
    shapes = dict(image=(BATCH, IMAGE, CHANNELS), text=(BATCH, TEXT, TEXT_WIDTH), time=(BATCH, TIME),
                  target=(BATCH, IMAGE, CHANNELS))
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    angles = torch.arange(TEXT + IMAGE)[:, None] / 10000 ** (torch.arange(HEAD // 2) / (HEAD // 2))
    save_tensors(f"{folder}/mmdit_inputs.safetensors", dict(inputs, cos=angles.cos(), sin=angles.sin()))


def mmdit(train):
    model, inputs = Mmdit(), load_file(f"{args.folder}/mmdit_inputs.safetensors")
    model.load_state_dict(load_file(f"{args.folder}/mmdit.safetensors"))
    target = inputs.pop("target")
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01), []

    def step():
        loss = F.mse_loss(model(**inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    def forward():
        with torch.no_grad():
            losses.append(float(F.mse_loss(model(**inputs), target)))

    report(secs=measured(step if train else forward), losses=losses)


# --- the autoencoder -------------------------------------------------------------------------------------------------

def autoencoder():
    from diffsynth.models.qwen_image_vae import QwenImageVAE
    return QwenImageVAE(base_dim=VAE["base_dim"])


def export_vae(folder):
    vae = healthy_init(autoencoder(), 21)
    os.makedirs(f"{folder}/vae")
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    save_file(weights, f"{folder}/vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    statistics = json.load(open(os.path.join(GOLDENS, "..", "qwen_image", "model", "vae", "config.json")))
    config = dict(statistics, **VAE)
    json.dump(config, open(f"{folder}/vae/config.json", "w"), indent=2)
    generator = gen(22)
    save_tensors(f"{folder}/vae_inputs.safetensors", dict(
        pixels=torch.rand((1, 3, SIDE, SIDE), generator=generator) * 2 - 1,
        latents=torch.randn((1, 16, SIDE // 8, SIDE // 8), generator=generator)))


def vae(encode):
    model, inputs, sizes = autoencoder(), load_file(f"{args.folder}/vae_inputs.safetensors"), []
    model.load_state_dict(load_file(f"{args.folder}/vae/diffusion_pytorch_model.safetensors"))

    @torch.no_grad()
    def step():
        found = model.encode(inputs["pixels"]) if encode else model.decode(inputs["latents"])
        sizes.append(float(found.double().square().mean().sqrt()))

    report(secs=measured(step), losses=sizes)


# --- a whole program -------------------------------------------------------------------------------------------------

def generate():
    import ds_tiny
    pipe = ds_tiny.load_pipe(args.model)
    image = pipe("a red apple", cfg_scale=1.0, num_inference_steps=4, height=64, width=64, seed=0, rand_device="cpu",
                 progress_bar_cmd=lambda x: x)
    image.save(args.output)
    report(secs=[], losses=[])


def export():
    os.makedirs(args.folder, exist_ok=True)
    export_distillation(args.folder)
    export_mmdit(args.folder)
    export_vae(args.folder)


{"export": export, "distill": distill, "family": family, "mmdit-train": lambda: mmdit(True), "mmdit-forward": lambda: mmdit(False),
 "vae-encode": lambda: vae(True), "vae-decode": lambda: vae(False), "generate": generate}[args.work]()
