"""Compare our networks with those of diffusers and transformers, at the size of SD 1.5, with equal weights.

    python benchmarks/sd15.py parity            largest relative differences; memory for loading an fp16 file
    python benchmarks/sd15.py loading           memory for loading only
    python benchmarks/sd15.py speed             time (median of alternating runs) and peak memory
    python benchmarks/sd15.py speed --small     the same at a twentieth of the size, in a minute

Nothing is downloaded: the weights are random.  Needs the [test] dependencies.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from benchmarks.srrl import seconds
from minireflect.checkpoints import names
from minireflect.checkpoints.files import load_into
from minireflect.diffusion.sample import denoise, last
from minireflect.diffusion.schedule import Schedule, ScheduleConfig
from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig
from minireflect.models.clip import CLIP, TextConfig, TextEncoder, VisionConfig
from minireflect.models.clip import CLIPConfig as OurCLIP
from minireflect.models.tokenizer import NoVocabulary
from minireflect.models.unet import UNet, UNetConfig
from minireflect.pipeline import LatentDiffusion, best_device
from minireflect.run import Networks
from scripts.reports import described

CHANNELS = {"sd15": (320, 640, 1280, 1280), "small": (64, 128, 256, 256)}
TEXT = {"sd15": (768, 12), "small": (128, 4)}
VAE = {"sd15": (128, 256, 512, 512), "small": (32, 64, 128, 128)}


def theirs(size: str) -> Networks:
    """The networks of diffusers and transformers, on the CPU in float32."""
    width, layers = TEXT[size]
    unet = UNet2DConditionModel(
        block_out_channels=CHANNELS[size], cross_attention_dim=width, attention_head_dim=8, sample_size=64,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=VAE[size], layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.18215, sample_size=512,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=49_408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, hidden_act="quick_gelu", eos_token_id=49_407, bos_token_id=49_406,
    ))  # fmt: skip
    return {"unet": unet.eval(), "vae": vae.eval(), "text": text.eval()}


def ours(size: str, other: Networks) -> Networks:
    """Our networks, with the tensors of the other networks, to be trained."""
    width, layers = TEXT[size]
    with torch.device("meta"):
        unet = UNet(UNetConfig(CHANNELS[size], (1, 1, 1, 0), 1, width, heads=8))
        vae = Autoencoder(AutoencoderConfig(VAE[size], scaling_factor=0.18215))
        text = TextEncoder(TextConfig(49_408, 49_407, width=width, layers=layers, heads=width // 64))
    load_into(unet, other["unet"].state_dict(), names.DIFFUSERS_UNET)
    load_into(vae, other["vae"].state_dict(), names.DIFFUSERS_AUTOENCODER)
    load_into(text, other["text"].state_dict(), names.TRANSFORMERS_CLIP_TEXT)
    nets = {"unet": unet, "vae": vae, "text": text}
    return {name: net.eval().requires_grad_(True) for name, net in nets.items()}


def calls(nets: Networks) -> dict[str, Callable[..., Tensor]]:
    """The functions of one side that are compared; both sides have the same inputs and outputs."""
    unet, vae, text = nets["unet"], nets["vae"], nets["text"]
    if isinstance(unet, UNet):
        encode = {"autoencoder encode": lambda images: vae.moments(images)[0]}
        return {"text encoder": text, "UNet forward": unet, **encode, "autoencoder decode": vae.decode}
    return {
        "text encoder": lambda ids: text(ids).last_hidden_state,
        "UNet forward": lambda x, t, context: unet(x, t, context).sample,
        "autoencoder encode": lambda images: vae.encode(images).latent_dist.mean,
        "autoencoder decode": lambda x: vae.decode(x / 0.18215).sample,
    }


def off(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, divided by the largest absolute value."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


# --- parity -------------------------------------------------------------------------------------------------


@torch.no_grad()
def parity(size: str, latent: int) -> None:
    torch.manual_seed(0)
    them = theirs(size)
    us = ours(size, them)
    sizes = [p.numel() for p in us["unet"].parameters()]
    print(f"UNet: {sum(sizes):,} parameters, {len(us['unet'].state_dict())} tensors")
    x, t = torch.randn(1, 4, latent, latent), torch.tensor([501])
    ids = torch.randint(0, 49_000, (2, 77))
    ids[:, 20:] = 49_407
    hidden = calls(them)["text encoder"](ids)
    images = torch.rand(1, 3, 8 * latent, 8 * latent) * 2 - 1
    inputs = (ids,), (x, t, hidden[:1]), (images,), (x,)
    mine, other = calls(us), calls(them)
    rows = {name: off(mine[name](*given), other[name](*given)) for name, given in zip(mine, inputs)}
    found = our_twenty_steps(our_pipeline(us, hidden[1:], 8 * latent), hidden[:1], x) / 2 + 0.5
    expected = their_twenty_steps(diffusers_pipeline(them), *hidden.split(1), x)
    difference = (found - expected).abs().max().item()
    rows["picture, 20 DDIM steps, guidance 7.5 (absolute, of a range of 1)"] = difference
    del us, mine  # our networks
    rows |= clip_parity(size)
    for name, value in rows.items():
        print(f"{name:66} {value:.1e}")
    memory_of_loading(them, size)


def our_pipeline(us: Networks, null: Tensor, side: int) -> LatentDiffusion:
    """Our pipeline of these networks, with an embedded null prompt."""
    schedule = Schedule(ScheduleConfig())
    pipe = LatentDiffusion(NoVocabulary("", 77), us["text"], us["unet"], us["vae"], schedule, side)
    pipe.null = lambda: null
    return pipe


@torch.no_grad()
def our_twenty_steps(pipe: LatentDiffusion, prompt: Tensor, x: Tensor) -> Tensor:
    """Pictures of our pipeline, from an embedded prompt.  Shapes: prompt (b t d), x (b 4 h/8 w/8)"""
    return pipe.decode(last(denoise(pipe.eps(prompt)(7.5), x, pipe.table(20))))


def their_twenty_steps(pipe: StableDiffusionPipeline, prompt: Tensor, null: Tensor, x: Tensor) -> Tensor:
    """Pictures of diffusers, from embedded prompts.  Shapes: prompt, null (b t d), x (b 4 h w)"""
    side = 8 * x.shape[-1]
    return pipe(
        prompt_embeds=prompt, negative_prompt_embeds=null, latents=x, num_inference_steps=20,
        guidance_scale=7.5, output_type="pt", height=side, width=side,
    ).images  # fmt: skip


def ddim() -> DDIMScheduler:
    """DDIM of diffusers with the schedule of SD 1.5."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def diffusers_pipeline(them: Networks) -> StableDiffusionPipeline:
    """diffusers' pipeline of these networks, with DDIM."""
    parts = them["vae"], them["text"], None, them["unet"], ddim(), None, None
    pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip_parity(size: str) -> dict[str, float]:
    """Differences of both encoders of CLIP ViT-L/14."""
    layers = (12, 24) if size == "sd15" else (2, 2)
    text = {"vocab_size": 49_408, "eos_token_id": 49_407, "num_hidden_layers": layers[0]}
    text |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {"image_size": 224, "patch_size": 14, "num_hidden_layers": layers[1]}
    vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    them = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).eval()
    with torch.device("meta"):
        config = TextConfig(49_408, 49_407, layers=layers[0]), VisionConfig(layers=layers[1])
        us = CLIP(OurCLIP(*config, width=768))
    load_into(us, them.state_dict(), names.TRANSFORMERS_CLIP)
    images, ids = torch.randn(2, 3, 224, 224), torch.randint(0, 49_000, (2, 77))
    ids[:, 9] = 49_407
    expected = them(input_ids=ids, pixel_values=images)
    return {
        "CLIP L/14, pictures": off(us.encode_image(images), expected.image_embeds),
        "CLIP L/14, sentences": off(us.encode_text(ids), expected.text_embeds),
    }


LOADING = """
import sys
from pathlib import Path
import torch, torchvision, tokenizers, matplotlib.pyplot
from minireflect import load_pipeline
import minireflect.checkpoints
def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(what)).split()[1])
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
pipe = load_pipeline(sys.argv[1])
loaded = resident("VmHWM")
parts = (pipe.unet, pipe.text_encoder, pipe.autoencoder)
total = sum(p.flatten()[::1024].float().sum().item() for m in parts for p in m.parameters())
print(loaded - before, resident("VmHWM") - before, next(pipe.unet.parameters()).dtype)
"""


def memory_of_loading(them: Networks, size: str) -> None:
    """Peak resident memory for loading an original fp16 file, relative to the size of the file."""
    from tests.parity.checkpoints import original_unet, original_vae

    tensors = original_unet(them["unet"].state_dict(), 4, 2) | original_vae(them["vae"].state_dict(), 4)
    text = {n.removeprefix("text_model."): t for n, t in them["text"].state_dict().items()}
    tensors |= {f"cond_stage_model.transformer.text_model.{n}": t for n, t in text.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{size}.safetensors"
        save_file({n: t.half().contiguous() for n, t in tensors.items()}, file)
        command = [sys.executable, "-c", LOADING, str(file)]
        loaded, touched, dtype = subprocess.check_output(command, text=True).split()
        bytes_ = file.stat().st_size
    said = f"fp16 file of {bytes_ / 1e9:.2f} GB loaded as {dtype}: peak {int(loaded) / bytes_:.2f}"
    print(f"{said} times its size, {int(touched) / bytes_:.2f} after every weight was read")


# --- speed --------------------------------------------------------------------------------------------------

Work = dict[str, Callable[[], object]]


def work(nets: Networks, size: str, latent: int, device: torch.device, dtype: torch.dtype) -> Work:
    """The tasks that are timed, for the networks of one side."""
    nets = {k: m.to(device, dtype) for k, m in nets.items()}
    g, (width, _) = torch.Generator().manual_seed(0), TEXT[size]
    x = torch.randn(1, 4, latent, latent, generator=g).to(device, dtype)
    context = torch.randn(1, 77, width, generator=g).to(device, dtype)
    images = torch.randn(1, 3, 8 * latent, 8 * latent, generator=g).to(device, dtype)
    t, ids = torch.tensor([501], device=device), torch.full((2, 77), 49_407, device=device)
    both, inputs = calls(nets), ((ids,), (x, t, context), (images,), (x,))

    def backward() -> None:
        both["UNet forward"](x, t, context).float().square().mean().backward()
        nets["unet"].zero_grad(set_to_none=True)

    tasks = {name: torch.no_grad()(partial(both[name], *given)) for name, given in zip(both, inputs)}
    tasks["UNet forward and backward"] = backward
    if dtype != torch.float32:
        return tasks
    if isinstance(nets["unet"], UNet):
        steps = partial(our_twenty_steps, our_pipeline(nets, context, 8 * latent), context, x)
    else:
        steps = partial(their_twenty_steps, diffusers_pipeline(nets), context, context, x)
    return tasks | {"20 steps with guidance": steps}


def speed(size: str, latent: int, repeats: int, device: torch.device, dtype: torch.dtype) -> None:
    """Time both sides, alternating in one process, so that other load affects both equally."""
    torch.manual_seed(0)
    them = theirs(size)
    us = ours(size, them)
    for module in us.values() if device.type == "cuda" else ():
        module.to(memory_format=torch.channels_last)  # as LatentDiffusion.to does there
    sides = {"ours": us, "theirs": them}
    both = {side: work(nets, size, latent, device, dtype) for side, nets in sides.items()}
    where = f"{device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads"
    heads = "ours, s | theirs, s | ratio | peak memory, ratio"
    print(f"| {size}, latents {latent} x {latent}, {where} | {heads} |\n|---|---|---|---|---|")
    for name in both["ours"]:
        times = seconds(device, {side: tasks[name] for side, tasks in both.items()}, repeats).values()
        mine, other = map(statistics.median, times)
        ratio = statistics.median(a / b for a, b in zip(*times))
        memory = [peak_memory(s, name, size, latent, device, tasks[name]) for s, tasks in both.items()]
        found = f"{mine:.3f} | {other:.3f} | {ratio:.2f} | {memory[0] / memory[1]:.2f}"
        print(f"| {name} | {found} |", flush=True)


def peak_memory(
    side: str, name: str, size: str, latent: int, device: torch.device, call: Callable[[], object]
) -> float:
    """Peak memory in bytes, without the weights.  On the CPU it is measured in a separate process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    words = [sys.executable, __file__, "memory", "--side", side, "--task", name, "--size", size]
    words += ["--latent", str(latent)]
    said = subprocess.check_output(words, text=True, stderr=subprocess.DEVNULL)  # warnings of diffusers
    return json.loads(said.splitlines()[-1])


def memory(side: str, task: str, size: str, latent: int) -> None:
    """Print the peak resident memory of one task in this process, minus the memory before the task."""
    torch.manual_seed(0)
    nets = ours(size, theirs(size)) if side == "ours" else theirs(size)
    call = work(nets, size, latent, torch.device("cpu"), torch.float32)[task]
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = resident("VmRSS")
    call()
    print(json.dumps(resident("VmHWM") - before))


def resident(what: str) -> int:
    """A value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("what", choices=("parity", "loading", "speed", "memory"))
    parser.add_argument("--size", choices=tuple(CHANNELS), default="sd15")
    parser.add_argument("--small", dest="size", action="store_const", const="small")
    parser.add_argument("--latent", type=int, default=32, help="side of the latents (default: 32)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--side"), parser.add_argument("--task")
    args = parser.parse_args()
    if args.what == "parity":
        parity(args.size, args.latent)
    elif args.what == "loading":
        memory_of_loading(theirs(args.size), args.size)
    elif args.what == "speed":
        speed(args.size, args.latent, args.repeats, torch.device(args.device), getattr(torch, args.dtype))
    else:
        memory(args.side, args.task, args.size, args.latent)


if __name__ == "__main__":
    main()
