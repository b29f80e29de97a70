"""Parameters through safetensors. requirements-frameworks.txt has what it takes."""

import pytest
from subjects import FORMS, Subject, assert_same_bits, make

safetensors = pytest.importorskip(
    "safetensors.torch", reason="needs safetensors: make test-frameworks"
)


@pytest.mark.parametrize("whole", [False, True], ids=["state_dict", "model"])
@pytest.mark.parametrize("form", FORMS)
def test_safetensors(form, whole, tmp_path):
    subject, other = Subject(form), Subject(form)
    file = tmp_path / "net.safetensors"
    other.net = make(form).double()
    if whole:
        safetensors.save_model(subject.net, file)
        assert safetensors.load_model(other.net, file) == (set(), [])
    else:
        safetensors.save_file(subject.net.state_dict(), file)
        other.net.load_state_dict(safetensors.load_file(file))
    assert_same_bits(other.call(*other.tensors), subject.call(*subject.tensors))
