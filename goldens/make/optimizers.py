"""Ten steps of each optimiser by the package that defines it, from the same start and with the same gradients.

The gradients are a fixed direction plus noise, as those of a slow descent are; Prodigy's estimate then grows. They are
stored in bf16, exactly. The learning rate changes from step to step.
"""
import bitsandbytes
import bitsandbytes.backends.cpu.ops as bitsandbytes_cpu
import prodigyopt
import torch
import transformers
from torch.optim import _muon

from common import gen, out_dir, save_tensors

STEPS = 10
SHAPES = {"wide": (65, 66), "tall": (40, 24), "vector": (40,)}
RATE = 1e-2
RATES = [RATE * factor for factor in (0.5, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5)]
BETAS, EPSILON, DECAY = (0.9, 0.99), 1e-8, 0.1


def draws():
    """Start values and gradients by name."""
    g = gen(7)
    start = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    slope = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    noisy = lambda name: slope[name] + 0.5 * torch.randn(SHAPES[name], generator=g)
    return start, [{name: (0.1 * noisy(name)).bfloat16() for name in SHAPES} for _ in range(STEPS)]


def run(start, gradients, make, rates):
    """Parameters after the first step and after the last, and the optimisers; `make` maps parameters to those."""
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizers, records = make(parameters), {}
    for step, (rate, named) in enumerate(zip(rates, gradients), start=1):
        for name, parameter in parameters.items():
            parameter.grad = named[name].float()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        if step in (1, STEPS):
            records |= {f"step{step}.{name}": value.detach().clone() for name, value in parameters.items()}
    return records, optimizers, parameters


def adamw(parameters):
    return [torch.optim.AdamW(parameters.values(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)]


def nearest_codes(values, codes, scales, out, block):
    """The nearest code of each number, as the paper says. On a CPU the package looks codes up by 16 bits of the number,
    which misses the nearest one near zero (163 of 8,580 codes here differ after ten steps)."""
    middles = (codes[1:] + codes[:-1]) / 2
    for index, part in enumerate(values.flatten().split(block)):
        scales[index] = part.abs().max()
        out.view(-1)[index * block:][:len(part)] = torch.bucketize(part * (1 / scales[index]), middles)


def adamw8bit(parameters):
    bitsandbytes_cpu._quant_blockwise_fp32_direct = nearest_codes
    return [bitsandbytes.optim.AdamW8bit(
        parameters.values(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)]


def adafactor(parameters):
    return [transformers.optimization.Adafactor(
        parameters.values(), lr=RATE, scale_parameter=False, relative_step=False, weight_decay=DECAY)]


def prodigy(parameters):
    return [prodigyopt.Prodigy(
        parameters.values(), lr=1.0, betas=BETAS, eps=EPSILON, weight_decay=DECAY, d_coef=2.0,
        use_bias_correction=True, safeguard_warmup=True)]


class Float32:
    """torch, save that its bfloat16 is float32: Muon's Newton-Schulz steps are in the former."""
    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def muon(parameters):
    matrices = [p for p in parameters.values() if p.ndim == 2]
    vectors = {name: p for name, p in parameters.items() if p.ndim != 2}
    return [torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            *adamw(vectors)]


def main():
    start, gradients = draws()
    tensors = {f"start.{name}": value for name, value in start.items()}
    tensors |= {f"gradient{step}.{name}": value
                for step, named in enumerate(gradients, start=1) for name, value in named.items()}
    tensors["rates"] = torch.tensor(RATES, dtype=torch.float64)

    def record(optimizer, make, rates=RATES, scale=1.0):
        scaled = {name: scale * value for name, value in start.items()}
        records, optimizers, parameters = run(scaled, gradients, make, rates)
        tensors.update({f"{optimizer}.{key}": value for key, value in records.items()})
        return optimizers, parameters

    record("adamw", adamw)
    [optimizer], parameters = record("adamw8bit", adamw8bit)
    state = optimizer.state[parameters["wide"]]
    tensors |= {f"adamw8bit.{key}": state[key] for key in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")}
    assert optimizer.state[parameters["tall"]]["state1"].dtype == torch.float32
    record("adafactor", adafactor)
    # Far above the usual 1, so that ten steps from an estimate of 1e-6 go far. The first ones are short, and the
    # estimate is made of differences to the start: that has to be small for them not to be lost in rounding.
    multipliers = [rate * 500 for rate in RATES]
    [optimizer], _ = record("prodigy", prodigy, multipliers, scale=2.0**-10)
    tensors["prodigy.d"] = torch.tensor([optimizer.param_groups[0]["d"]], dtype=torch.float64)
    _muon.torch = Float32()
    record("muon", muon)
    versions = {package.__name__: package.__version__ for package in (torch, transformers, bitsandbytes)}
    save_tensors(f"{out_dir('.', 'optimizers')}/optimizers.safetensors", tensors, versions)


main()
