"""Our transformer's weights in transformers' Llama."""

from transformers import LlamaConfig, LlamaForCausalLM

from minireflect.models.transformer import Transformer

NAMES = {"embed": "model.embed_tokens", "norm_out": "model.norm", "head": "lm_head"}
LAYER = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.out": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def llama(ours: Transformer, attention: str = "sdpa") -> LlamaForCausalLM:
    """The same network, as transformers has it."""
    c = ours.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocabulary,
            hidden_size=c.width,
            intermediate_size=c.hidden,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            max_position_embeddings=c.length,
            attn_implementation=attention,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    names = NAMES | {
        f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for i in range(c.layers) for a, b in LAYER.items()
    }
    state = {f"{names[k.removesuffix('.weight')]}.weight": v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs.eval()
