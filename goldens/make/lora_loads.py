"""Whether LoRA files and fused folders made by fewstep load in diffusers and DiffSynth and give the same numbers.

python lora_loads.py MODEL REFERENCE PATH...

MODEL is the base's folder, REFERENCE a LoRA file of a peer, each PATH a LoRA file (any format) or a fused model folder
that must compute what the base computes with REFERENCE. Prints the largest difference of the transformer's output for
each path and program; exits with 1 if one is above the tolerance, or if a LoRA has no effect.
"""
import sys
from common import *
import ds_tiny
from diffsynth.pipelines.qwen_image import model_fn_qwen_image
from diffsynth.utils.lora import GeneralLoRALoader
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from einops import rearrange
from safetensors.torch import load_file

TOLERANCE = 1e-5  # f32 components agree to this
ROWS = COLUMNS = 4


def inputs(model):
    width = ds_tiny.cfg("transformer", model)["joint_attention_dim"]
    return torch.randn((1, 16, 2 * ROWS, 2 * COLUMNS), generator=gen(1)), torch.randn((1, 7, width), generator=gen(2)), torch.tensor([500.0])


@torch.no_grad()
def in_diffusers(model, path):
    folder = os.path.isdir(path)
    transformer = QwenImageTransformer2DModel.from_pretrained(f"{path if folder else model}/transformer")
    if not folder and path:
        state, metadata = QwenImagePipeline.lora_state_dict(os.path.dirname(os.path.abspath(path)), weight_name=os.path.basename(path), return_lora_metadata=True)
        QwenImagePipeline.load_lora_into_transformer(state, transformer, adapter_name="file", metadata=metadata)
    latents, text, timestep = inputs(model)
    packed = rearrange(latents, "B C (H P) (W Q) -> B (H W) (C P Q)", P=2, Q=2)
    out = transformer(hidden_states=packed, timestep=timestep / 1000, encoder_hidden_states=text, encoder_hidden_states_mask=None, img_shapes=[[(1, ROWS, COLUMNS)]], return_dict=False)[0]
    return rearrange(out, "B (H W) (C P Q) -> B C (H P) (W Q)", H=ROWS, P=2, Q=2)


@torch.no_grad()
def in_diffsynth(model, path):
    folder = os.path.isdir(path)
    dit = ds_tiny.load_dit(path if folder else model, "tanh")
    if not folder and path:
        GeneralLoRALoader(device="cpu", torch_dtype=torch.float32).fuse_lora_to_base_model(dit, load_file(path))
    latents, text, timestep = inputs(model)
    mask = torch.ones(text.shape[:2], dtype=torch.long)
    return model_fn_qwen_image(dit=dit, latents=latents, timestep=timestep, prompt_emb=text, prompt_emb_mask=mask, height=16 * ROWS, width=16 * COLUMNS)


def prefixed(path):
    return not os.path.isdir(path) and all(key.startswith("transformer.") for key in load_file(path))


def main(model, reference, *paths):
    base, expected, good = in_diffusers(model, ""), in_diffusers(model, reference), True
    print(f"the reference moves the output by {float((expected - base).abs().max()):.3g}")
    for path in paths:
        for program, run in (("diffusers", in_diffusers), ("DiffSynth", in_diffsynth)):
            out = run(model, path)
            error, effect = float((out - expected).abs().max()), float((out - base).abs().max())
            known = program == "DiffSynth" and prefixed(path)
            good &= known or (error <= TOLERANCE and effect > 100 * TOLERANCE)
            print(f"{path} in {program}: off by {error:.3g}" + (" (that program reads no keys with the prefix `transformer.`)" if known else ""))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
