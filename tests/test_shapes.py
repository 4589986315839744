"The shapes and types in tokkit's signatures are checked while the tests run (see addopts in pyproject.toml)"
import pytest, torch
from jaxtyping import TypeCheckError


def test_a_wrong_dtype_is_caught():
    from tokkit.data import from_uint8
    assert from_uint8(torch.zeros(2, dtype=torch.uint8)).tolist() == [-1., -1.]
    with pytest.raises(TypeCheckError): from_uint8(torch.zeros(2))


def test_a_wrong_shape_is_caught():
    from tokkit.quantizers import nearest_codes
    v = torch.randn(5, 4)
    codes = torch.randn(8, 4)
    assert nearest_codes(v, codes).shape == (5, 1)
    with pytest.raises(TypeCheckError): nearest_codes(v, codes[0])


def test_every_module_is_checked():
    import tokkit.core
    assert getattr(tokkit.core.__loader__, '__class__', type(None)).__module__.startswith('jaxtyping')
