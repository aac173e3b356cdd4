"""What the console command can do: its commands, and what `train` can train."""

COMMANDS = {
    "sample": "sample pictures of prompts, and say what the inspector reads in them",
    "train": "train a model; `minireflect train --help` lists what can be trained",
    "inspect": "say what is in a file: a checkpoint, a LoRA, or a picture of the synthetic world",
}
TRAINED = {  # command: (what it trains, minutes of the preset cpu on two cores)
    "srrl": ("reinforce the diffusion model: SRRL, DDPO or GRPO; with --base a LoRA on Stable Diffusion", 9),
    "all": ("autoencoder, diffusion, reward and srrl from nothing; with --scenes graphs all of RL-RIG", 85),
    "autoencoder": ("pictures to latents and back", 13),
    "diffusion": ("the base: latents from noise and a prompt", 25),
    "reward": ("the learned reward: does the prompt hold for the picture?", 35),
    "rlrig": ("reinforce the Actor, then the editor, of RL-RIG", 13),
    "checker": ("RL-RIG's Checker, and the judge that measures from outside", 25),
    "actor": ("RL-RIG's Actor: which edit does the picture need?", 13),
    "reason-grpo": ("reinforce ReasonGen-R1 on rationale and picture", 17),
    "reason-sft": ("ReasonGen-R1 on true rationales", 45),
    "vq": ("the codebook of image tokens", 11),
    "captioner": ("the reader of rationales: does the picture keep what was written?", 11),
}
