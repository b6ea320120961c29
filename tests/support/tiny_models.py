"""Tiny causal language models of transformers, random and without dropout."""

import torch

CLASSES = 43
KINDS = ("GPT2", "Llama", "Mixtral", "Gemma3")


def tiny(transformers, kind, head="CausalLM", dtype=torch.float32, **settings):
    """A model of a kind, the same at each call; `head` is "CausalLM" or "SequenceClassification"."""
    sizes = {
        "vocab_size": CLASSES,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "head_dim": 8,
    }
    name, scale = kind, 0.4  # losses that differ
    if kind == "GPT2":
        sizes = {"vocab_size": CLASSES, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
        sizes |= dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    elif kind == "Mixtral":
        sizes |= {"num_local_experts": 2, "experts_implementation": "eager"}
    elif kind == "Gemma3":
        sizes |= {"sliding_window": 64, "layer_types": ["full_attention"]}
        name = "Gemma3Text"
    config = getattr(transformers, f"{name}Config")(
        **sizes,
        initializer_range=scale,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **settings,
    )
    ending = "LMHeadModel" if (kind, head) == ("GPT2", "CausalLM") else f"For{head}"
    torch.manual_seed(0)
    return getattr(transformers, kind + ending)(config).to(dtype)
