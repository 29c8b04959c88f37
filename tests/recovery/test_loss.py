"""The losses of recovery against their textbook forms."""

import pytest
import torch
from torch.nn import functional

from halfplate.recovery.loss import divergence, square_head


@pytest.mark.parametrize("tokens", [1, 32, 70])
def test_divergence_and_its_gradient_are_those_of_the_definition(tokens):
    generator = torch.Generator().manual_seed(tokens)
    student = (3 * torch.randn(tokens, 50, generator=generator)).requires_grad_(True)
    teacher = 3 * torch.randn(tokens, 50, generator=generator)
    found = divergence(student, teacher)
    (5 * found).backward()

    naive = student.detach().double().requires_grad_(True)
    p = teacher.double().softmax(-1)
    expected = (p * (p.log() - naive.log_softmax(-1))).sum(-1).mean()
    (5 * expected).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(student.grad, naive.grad.float(), rtol=1e-4, atol=1e-7)


def test_divergence_of_a_model_from_itself_is_nothing():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    found = divergence(logits, logits.detach())
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-7)
    assert logits.grad.abs().max() < 1e-7


def test_divergence_takes_half_precision():
    logits = torch.randn(5, 20).to(torch.bfloat16).requires_grad_(True)
    divergence(logits, torch.randn(5, 20).to(torch.bfloat16)).backward()
    assert logits.grad.dtype == torch.bfloat16


def test_square_head_is_relative_to_the_teacher_block_by_block():
    teacher = [torch.randn(2, 3, 4), 100 * torch.randn(2, 3, 4)]
    student = [1.1 * part for part in teacher]
    assert square_head(student, teacher).item() == pytest.approx(0.01, rel=1e-4)
    assert square_head([teacher[0], 2 * teacher[1]], teacher).item() == pytest.approx(0.5, rel=1e-4)
    first = functional.mse_loss(student[0], teacher[0]) / teacher[0].square().mean()
    assert square_head(student[:1], teacher[:1]).item() == pytest.approx(first.item(), rel=1e-5)
