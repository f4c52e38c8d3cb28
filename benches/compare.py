"""Compares fewstep with its peer on this machine: times, peak memories of whole processes, and losses side by side.

    cargo build --release --bin fewstep --example ours
    python -m venv ~/peer && ~/peer/bin/pip install -r benches/requirements.txt
    ~/peer/bin/python benches/compare.py --work runs/compare

Weights and inputs are exported once into --work. Then both sides run in turn, each in a process of its own with the
same number of threads, --rounds times. A ratio is ours over the peer's of the same round (medians over the steps of a
process); the table has the median of the rounds and their range. Exits with 1 where a target is missed or numbers
differ. Nothing else should run meanwhile; ratios bear some load, times do not.
"""
import argparse, csv, json, os, shutil, statistics, subprocess, sys, tempfile, time
from PIL import Image
from safetensors.numpy import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


class Run:
    """One process."""
    def __init__(self, secs, losses, peak_bytes, wall_secs):
        self.secs, self.losses, self.peak_bytes, self.wall_secs = secs, losses, peak_bytes, wall_secs

    def step_secs(self):
        return statistics.median(self.secs) if self.secs else self.wall_secs


class Row:
    """A line of the table: two measurements by name, with the most that their ratios may be."""
    def __init__(self, work, ours, peer, time_target, memory_target=None, loss_tolerance=2e-6):
        self.work, self.ours, self.peer = work, ours, peer
        self.time_target, self.memory_target, self.loss_tolerance = time_target, memory_target, loss_tolerance


# Folders of goldens; prompt and seed of family_train.py.
FAMILY_PROMPT, FAMILY_SEED = "a photo of a cat sitting on the red sofa", 9001
FAMILIES = {"flux": "FLUX.1", "sd15": "Stable Diffusion 1.5", "sd3": "Stable Diffusion 3", "sdxl": "SDXL", "zimage": "Z-Image",
            "wan": "Wan 2.1"}

ROWS = {
    "lora-checkpointing": Row("distillation step, LoRA, checkpointing in both", "lora-checkpointing", "lora-checkpointing", 0.50, 0.35),
    "lora-least": Row("distillation step, LoRA, our least memory against its fastest", "lora-least", "lora", 0.75, 0.30),
    "lora-against-fastest": Row("distillation step, LoRA, our checkpointing against its fastest", "lora-checkpointing", "lora", 0.75, 0.30),
    "full-checkpointing": Row("distillation step, full, checkpointing in both", "full-checkpointing", "full-checkpointing", 0.50, 0.50),
    "lora": Row("distillation step, LoRA, checkpointing in neither", "lora", "lora", 0.65, 0.50),
    "lora-default": Row("the same with one student step in memory at a time", "lora-default", "lora", None),
    "full": Row("distillation step, full, checkpointing in neither", "full", "full", None),
    "sixteen-steps": Row("memory at 16 student steps against 4, checkpointing (both ours)", "sixteen-steps", None, None, 1.05),
    "mmdit-train": Row("plain training step, batch 8", "mmdit-train", "mmdit-train", 0.75),
    "mmdit-forward": Row("forward without gradients, batch 8", "mmdit-forward", "mmdit-forward", 0.70),
    "vae-decode": Row("autoencoder, decoding 256 x 256", "vae-decode", "vae-decode", 1.0, loss_tolerance=1e-5),
    "vae-encode": Row("autoencoder, encoding 256 x 256", "vae-encode", "vae-encode", 1.0, loss_tolerance=1e-5),
    **{f"family-{name}": Row(f"distillation step, LoRA, the small {shown}", f"family-{name}", f"family-{name}", 0.9)
       for name, shown in FAMILIES.items()},
    "start": Row("`generate` with the tiny model, whole process", "start", "start", 0.05, loss_tolerance=None),
}


def run(command, env=None):
    """Runs a process; its standard output, peak resident bytes and seconds."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=env, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        for stream in (output, errors):
            stream.seek(0)
        if status != 0:
            sys.exit(f"error: {' '.join(command)} failed\n{errors.read()}{output.read()}")
        return output.read(), usage.ru_maxrss * 1024, wall


class Comparison:
    def __init__(self, args):
        self.args, self.folder = args, os.path.abspath(args.work)
        self.inputs = os.path.join(self.folder, "inputs")
        self.binary = lambda *parts: os.path.join(args.binaries, *parts)
        self.env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))

    def export(self):
        if not os.path.exists(os.path.join(self.inputs, "done")):
            shutil.rmtree(self.inputs, ignore_errors=True)
            run([sys.executable, f"{HERE}/peer.py", "export", self.inputs])
            open(os.path.join(self.inputs, "done"), "w").close()

    def peer(self, name):
        work, *flags = {"lora": ["distill"], "full": ["distill", "--full"]}.get(name.split("-")[0], [name])
        if name.endswith("checkpointing"):
            flags.append("--checkpointing")
        if name.startswith("family"):
            family = name.split("-")[1]
            work, flags = "family", ["--family", family, "--model", f"{ROOT}/goldens/{family}/model"]
        if name == "start":
            work, flags = "generate", ["--model", f"{ROOT}/goldens/qwen_image/model", "--output", f"{self.folder}/peer.png"]
        steps = ["--steps", str(self.args.steps), "--warmup", str(self.args.warmup), "--threads", str(self.args.threads)]
        output, peak, wall = run([sys.executable, f"{HERE}/peer.py", work, self.inputs, *flags, *steps])
        found = json.loads(output.strip().splitlines()[-1])
        return Run(found["secs"], found["losses"], peak, wall)

    def ours(self, name):
        if name == "start":
            return self.start()
        if name.split("-")[0] in ("lora", "full", "four", "sixteen"):
            return self.distill(name)
        if name.startswith("family"):
            return self.family(name.split("-")[1])
        command = [self.binary("examples", "ours"), name, self.inputs, str(self.args.steps), str(self.args.warmup)]
        output, peak, wall = run(command, self.env)
        found = json.loads(output)
        return Run(found["secs"], found["losses"], peak, wall)

    def start(self):
        output = os.path.join(self.folder, "ours")
        shutil.rmtree(output, ignore_errors=True)
        _, peak, wall = run([self.binary("fewstep"), "generate", "--model", f"{ROOT}/goldens/qwen_image/model", "--prompt",
                             "a red apple", "--height", "64", "--width", "64", "--num-inference-steps", "4", "--cfg-scale",
                             "1", "--seed", "0", "--compat", "diffsynth", "--output", output], self.env)
        return Run([], [], peak, wall)

    def distill(self, name):
        """The peer's run by `fewstep train`, from its weights, text states, latents and adapters.

        All student steps are recorded, as the peer's graph holds them; for the least memory only the last one is."""
        student_steps = 16 if name == "sixteen-steps" else 4
        weights = json.dumps([f"{self.inputs}/transformer/diffusion_pytorch_model.safetensors"])
        command = ["--task", "direct_distill:train", "--model_paths", weights, "--dataset_base_path",
                   f"{self.inputs}/data{student_steps}", "--learning_rate", "1e-4"]
        if name.startswith("full"):
            command += ["--trainable_models", "dit"]
        else:
            command += ["--lora_base_model", "dit", "--lora_rank", "8", "--lora_checkpoint", f"{self.inputs}/lora.safetensors"]
        if not name.endswith(("default", "steps")):
            command += ["--recorded_steps", "1" if name.endswith("least") else str(student_steps)]
        if name.endswith(("checkpointing", "steps", "least")):
            command.append("--use_gradient_checkpointing")
        return self.train(command)

    def family(self, name):
        """The goldens' distillation of a family's small model, from a data set that holds its latents."""
        data, goldens = os.path.join(self.folder, "families", name), f"{ROOT}/goldens/{name}"
        os.makedirs(f"{data}/latents", exist_ok=True)
        latents = load_file(f"{goldens}/training.safetensors")["input_latents"][0]
        picture = Image.new("RGB", (64, 64))
        if latents.ndim == 4:  # a video; its frames are stacked along the height here
            channels, frames, height, width = latents.shape
            latents, column, file = latents.reshape(channels, frames * height, width), "video", "0.webp"
            shades = [Image.new("RGB", picture.size, (shade, 0, 0)) for shade in range(1, 4 * (frames - 1) + 1)]
            picture.save(f"{data}/{file}", save_all=True, append_images=shades, lossless=True)
        else:
            column, file = "image", "0.png"
            picture.save(f"{data}/{file}")
        save_file({"latents": latents}, f"{data}/latents/0.safetensors")
        with open(f"{data}/metadata.csv", "w") as rows:
            rows.write(f"{column},prompt,seed,rand_device,num_inference_steps,cfg_scale\n"
                       f"{file},{FAMILY_PROMPT},{FAMILY_SEED},cpu,4,1\n")
        return self.train(["--task", "direct_distill", "--model", f"{goldens}/model", "--dataset_base_path", data, "--lora_base_model",
                           "dit", "--lora_rank", "4", "--lora_checkpoint", f"{goldens}/lora_init.safetensors", "--learning_rate",
                           "1e-3", *(["--max_prompt_tokens", "64"] if name in ("flux", "sd3", "wan") else [])])

    def train(self, flags):
        """A run of `fewstep train` with the peer's numbers."""
        output = os.path.join(self.folder, "run")
        shutil.rmtree(output, ignore_errors=True)
        command = [self.binary("fewstep"), "train", "--compat", "diffsynth", "--output_path", output, "--max_steps",
                   str(self.args.warmup + self.args.steps), "--lr_schedule", "constant", "--log_steps", "1", "--save_steps", "0",
                   "--output_layout", "fewstep", *flags]
        _, peak, wall = run(command, self.env)
        rows = list(csv.DictReader(open(os.path.join(output, "loss.csv"))))
        secs = [1 / float(row["samples_per_sec"]) for row in rows]
        return Run(secs[self.args.warmup:], [float(row["loss"]) for row in rows], peak, wall)

    def round(self, rows):
        """Every measurement that the rows need, ours and the peer's in turn."""
        found = {}
        for row in rows:
            for side, name in (("ours", row.ours), ("peer", row.peer)):
                if name and (side, name) not in found:
                    found[side, name] = getattr(self, side)(name)
                    one = found[side, name]
                    print(f"  {side:4} {name:20} {one.step_secs():8.3f} s  {one.peak_bytes / 2**20:7.0f} MiB  "
                          f"losses {one.losses[:3]}", file=sys.stderr, flush=True)
            if row.peer is None:
                found["ours", "four-steps"] = self.ours("four-steps")
        return found


def difference(row, found):
    """Largest relative difference of the losses of both sides; none where there are none."""
    if row.peer is None or row.loss_tolerance is None:
        return None
    pairs = zip(found["ours", row.ours].losses, found["peer", row.peer].losses)
    return max(abs(ours / peer - 1) for ours, peer in pairs)


def ratios(row, rounds):
    """Ratios of time and of memory, one of each per round."""
    of = lambda found: (found["ours", row.ours], found["peer", row.peer] if row.peer else found["ours", "four-steps"])
    pairs = [of(found) for found in rounds]
    return [a.step_secs() / b.step_secs() for a, b in pairs], [a.peak_bytes / b.peak_bytes for a, b in pairs]


def shown(values, target):
    text = f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"
    if target is None:
        return text, True
    met = statistics.median(values) <= target
    return f"{text}, target {target:g}{'' if met else ', **missed**'}", met


def table(rows, rounds):
    lines, all_met = ["| work | time, ours / peer's | peak memory, ours / peer's | losses differ by |", "|---|---|---|---|"], True
    for row in rows:
        times, memories = ratios(row, rounds)
        time_text, time_met = shown(times, row.time_target) if row.peer else ("–", True)
        memory_text, memory_met = shown(memories, row.memory_target)
        off = [difference(row, found) for found in rounds]
        same = off[0] is None or max(off) <= row.loss_tolerance
        loss_text = "–" if off[0] is None else f"{max(off):.1e}" + ("" if same else ", **too much**")
        lines.append(f"| {row.work} | {time_text} | {memory_text} | {loss_text} |")
        all_met &= time_met and memory_met and same
    return "\n".join(lines), all_met


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="runs/compare", help="folder for inputs and runs [runs/compare]")
    parser.add_argument("--binaries", default=os.path.join(os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target"), "release"),
                        help="folder of the release build")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated: " + ", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each process [3]")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a process [8]")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them [2]")
    parser.add_argument("--threads", type=int, default=2, help="threads of either side [2]")
    args = parser.parse_args()
    comparison = Comparison(args)
    comparison.export()
    rows = [ROWS[name] for name in args.rows.split(",")]
    rounds = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        rounds.append(comparison.round(rows))
    text, met = table(rows, rounds)
    print(text)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
