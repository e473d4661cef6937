"""cce_patch(stats=True): accuracy and entropy of a model's tokens, as of the unpatched model's logits."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.models import batch, tiny  # noqa: E402

from cce_ext.transformers import TokenMeans, cce_patch, cce_unpatch  # noqa: E402


def expected(model, *batches) -> TokenMeans:
    """From the logits of an unpatched model, over all tokens of the batches."""
    correct, entropy = [], []
    for inputs in batches:
        log_p = model(input_ids=inputs["input_ids"]).logits[:, :-1].double().log_softmax(-1)
        labels = inputs["labels"][:, 1:]
        counts = labels != -100
        correct.append((log_p.argmax(-1) == labels)[counts])
        entropy.append(-(log_p.exp() * log_p).sum(-1)[counts])
    of_tokens = torch.cat(correct).float()
    return TokenMeans(of_tokens.mean(), torch.cat(entropy).mean().float(), torch.tensor(float(len(of_tokens))))


def with_right_labels(model, inputs):
    """Some of its labels are the model's own guesses, and some do not count."""
    labels = inputs["labels"].clone()
    guesses = model(input_ids=inputs["input_ids"]).logits.argmax(-1)
    labels[:, 1:5] = guesses[:, :4]
    labels[:, 3] = -100
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # the latter has a softcap
@pytest.mark.parametrize("divided", [{}, {"num_items_in_batch": 7}], ids=["", "divided"])
def test_micro_batches_and_evaluation(model_type, divided):
    """Each token counts alike, those of evaluation apart, and what was taken is gone."""
    model = tiny(model_type)
    batches = [with_right_labels(model, batch(rows)) for rows in (2, 1)]
    of_both, of_one = expected(model, *batches), expected(model, batches[0])
    cce_patch(model, stats=True).train()
    model.gradient_checkpointing_enable()
    twin = copy.deepcopy(model)
    for inputs in batches:
        model(**inputs, **divided).loss.backward()
    model.eval()
    with torch.inference_mode():
        model(**batches[0])
    assert 0 < of_both.token_accuracy < 1
    torch.testing.assert_close(model.cce_stats.take(), of_both, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.cce_stats.take(training=False), of_one, rtol=1e-4, atol=1e-5)
    assert model.cce_stats.take().tokens == 0 and model.cce_stats.take().token_accuracy.isnan()
    model(**batches[0])
    torch.testing.assert_close(model.cce_stats.take(False), of_one, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no forward with labels of training"):
        twin.cce_stats.take()  # a copy has its own


def test_of_a_class_and_by_a_compiler():
    model = tiny(num_hidden_layers=1, use_cache=False)
    inputs = with_right_labels(model, batch())
    wanted = expected(model, inputs, inputs)
    cce_patch("llama", stats=True)
    try:
        model.compile(fullgraph=True, backend="eager")
        for _ in range(2):
            model(**inputs)
        torch.testing.assert_close(model.cce_stats.take(False), wanted, rtol=1e-4, atol=1e-5)
    finally:
        cce_unpatch("llama")


def test_logs():
    model = cce_patch(tiny(), stats=True)
    with pytest.raises(ValueError, match="no forward with labels of training"):
        model.cce_stats.take()
    model(**batch())
    logs = {"eval_loss": 1.0}
    model.cce_stats.add_to_logs(logs)
    assert logs.keys() == {"eval_loss", "eval_token_accuracy", "eval_entropy"}
    model.cce_stats.add_to_logs(rates := {"train_runtime": 1.0, "learning_rate": 0.1})
    assert len(rates) == 2
    cce_patch(model)(**batch())
    assert not hasattr(model, "cce_stats")
    with pytest.raises(ValueError, match="stats: expected False with scan='fp8'"):
        cce_patch(model, scan="fp8", stats=True)
