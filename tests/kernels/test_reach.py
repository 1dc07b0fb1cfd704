"""What two plans of one seed share, and the error of the distance at which slopes double."""

from __future__ import annotations

import math

import pytest
import torch

from zokernel.commands.plan import PlanArguments, load_task
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.kernels.plan_walk import Growth, measured_reach, reach
from zokernel.kernels.probes import jackknife


def growth(*ratios: float) -> Growth:
    slopes = torch.tensor(ratios, dtype=torch.float64).sqrt()
    return Growth(torch.ones_like(slopes), 0.2, slopes)


def test_slopes_that_doubled_within_the_model_have_the_error_over_walks():
    walks = growth(4.0, 5.0, 6.0)
    assert measured_reach(walks) == jackknife(walks, reach)
    assert measured_reach(walks).error > 0


@pytest.mark.parametrize("ratios", [(1e6, 1e6), (1e6, 2e8, math.inf)])
def test_a_cliff_is_only_known_to_lie_between_two_distances(ratios):
    limit = measured_reach(growth(*ratios))
    low, high = 0.2 / math.sqrt(2), 0.2
    assert limit.value == pytest.approx(low)
    assert limit.error == pytest.approx((high - low) / math.sqrt(12))


def test_the_seed_of_a_plan_draws_the_weights_of_a_new_adapter(tiny_lm_path, tiny_reviews_path):
    model = ModelArguments(model_name_or_path=str(tiny_lm_path), lora=True)
    data = DataArguments(
        train_file=str(tiny_reviews_path / "train.jsonl"), template="{sentence} It was", label_words=["bad", "good"]
    )

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 2**32)  # whatever ran before
        task, _ = load_task(model, data, PlanArguments(update_examples=2, observe_examples=1, seed=seed))
        return torch.cat([p.flatten() for p in task.params.values()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
