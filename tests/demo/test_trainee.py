"""The training twin equals transformers, Muon makes orthogonal updates, and the first weights copy."""

from pathlib import Path

import pytest
import torch

from k2dist.checkpoint import publish
from k2dist.config.architecture import Architecture
from k2dist.demo.induction import begin_with_copying_
from k2dist.demo.muon import Muon, orthogonal
from k2dist.demo.shape import CONFIG, write_configs
from k2dist.demo.train import Run, optimizers
from k2dist.demo.trainee import Trainee


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return write_configs(tmp_path_factory.mktemp("demo"))


def test_logits_equal_transformers(architecture: Architecture) -> None:
    pytest.importorskip("transformers", reason="extra [train] is not installed")
    from k2dist.demo.offline import transformers_model

    trainee = Trainee(architecture, seed=3, dtype=torch.float32).eval()
    trainee.bias_LE.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    model = transformers_model(CONFIG, trainee.published())
    token_BS = torch.randint(0, 1024, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = trainee(token_BS), model(token_BS).logits.flatten(0, 1)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_kept_positions_have_the_same_logits(architecture: Architecture) -> None:
    trainee = Trainee(architecture, seed=3, dtype=torch.float32).eval()
    rng = torch.Generator().manual_seed(2)
    token_BS = torch.randint(0, 1024, (2, 30), generator=rng)
    keep_BS = torch.rand(2, 30, generator=rng) < 0.3
    with torch.no_grad():
        kept, full = trainee(token_BS, keep_BS), trainee(token_BS)
    torch.testing.assert_close(kept, full[keep_BS.flatten()], atol=1e-4, rtol=1e-4)


def test_published_tensors_are_what_a_checkpoint_needs(architecture: Architecture) -> None:
    trainee = Trainee(architecture, seed=0, dtype=torch.float32)
    assert publish(architecture, trainee.published())


def test_a_trainee_takes_what_another_publishes(architecture: Architecture) -> None:
    theirs, ours = (Trainee(architecture, seed=seed, dtype=torch.float32) for seed in (3, 4))
    theirs.bias_LE.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    theirs.bias_LE[: architecture.first_dense_layers] = 0
    ours.take_published_(theirs.published())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_first_weights_copy_what_came_before(architecture: Architecture) -> None:
    plain, begun = (Trainee(architecture, seed=1, dtype=torch.float32).eval() for _ in range(2))
    begin_with_copying_(begun, 1)
    part = torch.randperm(768, generator=torch.Generator().manual_seed(4))[:60]
    token_BS = torch.cat((part, part))[None]
    shares = []
    for trainee in (plain, begun):
        with torch.no_grad():
            chosen = trainee(token_BS)[60:-1].argmax(-1)
        shares.append(float((chosen == token_BS[0, 61:]).float().mean()))
    assert shares[0] < 0.1
    assert shares[1] > 0.7


def test_balance_moves_choice_towards_the_idle_expert(architecture: Architecture) -> None:
    trainee = Trainee(architecture, seed=1, dtype=torch.float32)
    trainee.load_LE[1:] = 1.0
    trainee.load_LE[1, 4] = 50.0
    trainee.balance_(0.25)
    assert trainee.bias_LE[1, 4] == -0.25
    assert (trainee.bias_LE[1, :4] == 0.25).all()
    assert (trainee.bias_LE[0] == 0).all()
    assert (trainee.load_LE == 0).all()


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (1, 32, 96)])
def test_orthogonal_makes_singular_values_alike(shape: tuple[int, int, int]) -> None:
    x_MNK = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    values = torch.linalg.svdvals(orthogonal(x_MNK))
    assert values.max() < 1.3
    assert values.min() > 0.3


def test_muon_steps_downhill_on_stacked_and_plain_matrices() -> None:
    rng = torch.Generator().manual_seed(6)
    params = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((16, 8), (3, 16, 8))]
    optimizer = Muon(params, lr=0.05)

    def loss() -> torch.Tensor:
        return torch.stack([param.square().mean() for param in params]).sum()

    before = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * before


def test_a_run_goes_on_from_its_state(tmp_path: Path, architecture: Architecture) -> None:
    runs = [Run(Trainee(architecture, seed=s, dtype=torch.float32), ()) for s in (1, 2)]
    for run in runs:
        run.optimizers = optimizers(run.trainee)
    runs[0].step = 17
    runs[0].trainee.bias_LE[1, 2] = 0.5
    runs[0].save(tmp_path / "state.pt")
    runs[1].load(tmp_path / "state.pt")
    assert runs[1].step == 17
    kept, read = (run.trainee.published() for run in runs)
    assert kept.keys() == read.keys()
    assert all(torch.equal(kept[name], read[name]) for name in kept)
