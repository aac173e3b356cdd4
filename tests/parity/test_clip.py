"""CLIP's two encoders equal those of transformers with the same weights."""

import pytest
import torch
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from minireflect.checkpoints.files import load_into
from minireflect.checkpoints.names import TRANSFORMERS_CLIP, TRANSFORMERS_CLIP_TEXT
from minireflect.models.clip import CLIP, CLIPConfig, TextConfig, TextEncoder, VisionConfig
from tests.models.test_clip import EOS, sentences, similarity
from tests.small import shaken

THEIR_TEXT = dict(
    vocab_size=50,
    bos_token_id=0,
    eos_token_id=EOS,
    pad_token_id=1,
    max_position_embeddings=9,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
)

THEIR_VISION = dict(
    image_size=24,
    patch_size=8,
    hidden_size=40,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=2,
)


@pytest.mark.parametrize("quick", [True, False])
def test_equals_transformers(quick: bool) -> None:
    torch.manual_seed(0)
    act = "quick_gelu" if quick else "gelu"
    theirs_config = TheirConfig(
        text_config={**THEIR_TEXT, "hidden_act": act},
        vision_config={**THEIR_VISION, "hidden_act": act},
        projection_dim=16,
    )
    theirs = shaken(CLIPModel(theirs_config), 0.1).eval()
    text = TextConfig(50, EOS, 9, width=32, layers=3, heads=4, quick_gelu=quick)
    vision = VisionConfig(size=24, patch=8, width=40, layers=2, heads=2, quick_gelu=quick)
    ours = CLIP(CLIPConfig(text, vision, width=16))
    load_into(ours, theirs.state_dict(), TRANSFORMERS_CLIP)
    images, ids = torch.randn(2, 3, 24, 24), sentences()
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=images)
        states, tokens = ours.text.states(ids), ours.vision(images)
        pairs = {
            "text states": (states.last, expected.text_model_output.last_hidden_state),
            "text pooled": (ours.text.pooled(states.last, ids), theirs.text_model(ids).pooler_output),
            "vision tokens": (tokens, expected.vision_model_output.last_hidden_state),
            "vision pooled": (ours.image_norm(tokens[:, 0]), theirs.vision_model(images).pooler_output),
            "text embedding": (ours.encode_text(ids), expected.text_embeds),
            "image embedding": (ours.encode_image(images), expected.image_embeds),
        }
        logits = similarity(ours, images, ids)
    # float32 of order 1: 1e-5 is about 80 units in the last place.
    for name, (found, wanted) in pairs.items():
        assert (found - wanted).abs().max() < 1e-5, name
    # exp(logit_scale) is 14, and multiplies the error as well.
    assert (logits - expected.logits_per_image).abs().max() < 1e-5 * ours.logit_scale.exp()


def test_second_encoder_of_sdxl_equals_transformers() -> None:
    torch.manual_seed(0)
    theirs = shaken(
        CLIPTextModelWithProjection(CLIPTextConfig(**THEIR_TEXT, projection_dim=20, hidden_act="gelu")), 0.1
    )
    config = TextConfig(
        50, EOS, 9, width=32, layers=3, heads=4, quick_gelu=False, penultimate=True, projection=20
    )
    ours = TextEncoder(config)
    tensors = {
        **theirs.state_dict(),
        "text_model.embeddings.position_ids": torch.arange(9),
    }  # as older files have it
    load_into(ours, tensors, TRANSFORMERS_CLIP_TEXT)
    ids = sentences()
    with torch.no_grad():
        expected = theirs(input_ids=ids, output_hidden_states=True)
        assert (ours(ids) - expected.hidden_states[-2]).abs().max() < 1e-5
        assert (
            ours.text_projection(ours.pooled(ours.states(ids).last, ids)) - expected.text_embeds
        ).abs().max() < 1e-5
