"""What diffusers' schedulers of noise predictors make of other spacings, predictions and ends: the last state of a run."""
from common import *
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

SD15 = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def last(s, n):
    """x = randn((1, 4, 3, 3), seed 11); call i of the network gives randn of seed 12 + i."""
    s.set_timesteps(n); x = torch.randn((1, 4, 3, 3), generator=gen(11)) * s.init_noise_sigma
    for i, t in enumerate(s.timesteps):
        s.scale_model_input(x, t); x = s.step(torch.randn((1, 4, 3, 3), generator=gen(12 + i)), t, x, return_dict=False)[0]
    return x


if __name__ == "__main__":
    t = {}
    for spacing in ("linspace", "trailing"):
        for one in (False, True):
            for n in (4, 7):
                t[f"ddim.{spacing}.{'one' if one else 'first'}.n{n}"] = last(DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=one, timestep_spacing=spacing), n)
    for kind in ("epsilon", "v_prediction"):
        for n in (2, 6):
            t[f"pndm.{kind}.n{n}"] = last(PNDMScheduler(**SD15, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, prediction_type=kind), n)
    t["euler.sigma_min.n4"] = last(EulerDiscreteScheduler(**SD15, timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min"), 4)
    save_tensors(f"{out_dir('open', 'schedulers')}/spacings.safetensors", t)
