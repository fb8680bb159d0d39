"""Messages of v2 become arrays and back; whatever else comes is refused with one error, soon and in little memory."""

from __future__ import annotations

import json
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fusenms.errors import InputError
from fusenms.runtime.tensors import Tensor
from fusenms.serving.protocol import DATATYPES, check_outputs, make_response, model_config, parse_request

X = Tensor(name="x", dtype=np.dtype(np.float32), shape=(-1, 2))
Y = Tensor(name="y", dtype=np.dtype(np.bool_), shape=(3,), lengths=(3,))
INPUTS = (X, Y)
GOOD = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2.5]}


def message(entry=GOOD, **more):
    return json.dumps({"inputs": [entry]} | more).encode()


def binary(size, data=b"\0" * 8, shape=(1, 2), **more):
    text = message(
        {"name": "x", "datatype": "FP32", "shape": list(shape), "parameters": {"binary_data_size": size}} | more
    )
    return text + data, str(len(text))


@pytest.mark.parametrize("name", DATATYPES.values())
@pytest.mark.parametrize("as_bytes", [True, False])
def test_tensor_of_every_type_comes_back(name, as_bytes):
    dtype = np.dtype(name)
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    if dtype.kind in "iu":
        values[0, 0], values[0, 1] = np.iinfo(dtype).min, min(np.iinfo(dtype).max, 2**63 - 1)
    asked = parse_request(message(parameters={"binary_data_output": as_bytes}), None, (X,))
    body, length = make_response("m", asked, {"t": values})
    assert (length is not None) == as_bytes
    text = json.dumps({"inputs": json.loads(body[:length])["outputs"]}).encode()
    data = body[length:] if as_bytes else b""
    tensor = Tensor(name="t", dtype=dtype, shape=(-1, 3))
    again = parse_request(text + data, str(len(text)) if as_bytes else None, (tensor,)).tensors["t"]
    np.testing.assert_array_equal(again, values)
    assert again.dtype == dtype


def test_request_is_taken_apart():
    outputs = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": True}}]
    found = parse_request(message(id="7", outputs=outputs, parameters={"priority": 3}), None, INPUTS)
    assert found.id == "7" and found.outputs == {"a": False, "b": True} and not found.binary
    np.testing.assert_array_equal(found.tensors["x"], np.array([[1, 2.5]], np.float32))
    nested = parse_request(message(GOOD | {"data": [[1, 2.5]]}), None, INPUTS)
    np.testing.assert_array_equal(nested.tensors["x"], found.tensors["x"])
    with pytest.raises(InputError, match="found the output 'b'; expected a"):
        check_outputs(found, [Tensor(name="a", dtype=np.dtype(np.float32), shape=(1,))])


BAD = {
    "nothing": (b"", "not JSON"),
    "array": (b"[]", r"found \[\] as the request; expected an object"),
    "deep": (b"[" * 200_000, "not JSON"),
    "deep data": (message(GOOD).replace(b"[1, 2.5]", b"[" * 900 + b"]" * 900), "no FP32|not JSON"),
    "NaN": (message(GOOD | {"data": [float("nan"), 1]}), "not JSON .*NaN"),
    "long number": (message(GOOD).replace(b"2.5", b"1" * 10_000), "not JSON"),
    "no inputs": (b"{}", "found the request without inputs"),
    "none of them": (b'{"inputs": []}', "found 0 inputs"),
    "many inputs": (json.dumps({"inputs": [GOOD] * 100}).encode(), "found 100 inputs"),
    "many objects": (b'{"inputs": [' + b"{}," * 2000 + b"{}]}", "more than 1000 times {"),
    "many strings": (b'{"inputs": ["' + b'","' * 9000 + b'"]}', 'more than 10000 times "'),
    "many lists": (message(GOOD).replace(b"[1, 2.5]", b"[" + b"[]," * 2_100_000 + b"[]]"), r"more than 2000000 times \["),
    "inputs that are none": (b'{"inputs": [3]}', "found 3 as an input; expected an object"),
    "unknown name": (message(GOOD | {"name": "z" * 9999}), "found the input 'zzz.*expected x float32"),
    "name of another type": (message(GOOD | {"name": 3}), "found name 3 of an input; expected a string"),
    "twice": (json.dumps({"inputs": [GOOD, GOOD]}).encode(), "found the input 'x' twice"),
    "datatype": (message(GOOD | {"datatype": "FP16"}), "found x of datatype 'FP16'; expected FP32"),
    "no datatype": (message({"name": "x", "shape": [1, 2], "data": [1, 2]}), "found x without datatype"),
    "negative shape": (message(GOOD | {"shape": [-1, -2]}), "expected up to 8 positive whole numbers"),
    "empty shape": (message(GOOD | {"shape": [0, 2], "data": []}), "expected up to 8 positive whole numbers"),
    "huge shape": (message(GOOD | {"shape": [2**39, 2**39]}), "found x with 2 numbers and the shape"),
    "huger shape": (message(GOOD | {"shape": [10**300]}), "expected up to 8 positive whole numbers"),
    "many sides": (message(GOOD | {"shape": [1] * 1000}), "expected up to 8"),
    "shape of booleans": (message(GOOD | {"shape": [True, 2]}), "expected up to 8"),
    "shape of fractions": (message(GOOD | {"shape": [1.0, 2]}), "expected up to 8"),
    "few numbers": (message(GOOD | {"data": [1]}), r"found x with 1 numbers and the shape \[1, 2\]; expected 2"),
    "ragged": (message(GOOD | {"data": [[1], 2]}), "data that are no FP32"),
    "text": (message(GOOD | {"data": ["1", "2"]}), "data that are no FP32"),
    "objects": (message(GOOD | {"data": [{}, {}]}), "data that are no FP32"),
    "null": (message(GOOD | {"data": [None, 1]}), "data that are no FP32"),
    "booleans as numbers": (message(GOOD | {"data": [True, False]}), "data that are no FP32"),
    "one number": (message(GOOD | {"data": 1}), "data that are no FP32"),
    "numbers as booleans": (message({"name": "y", "datatype": "BOOL", "shape": [3], "data": [0, 1, 1]}), "no BOOL"),
    "no data": (message({"name": "x", "datatype": "FP32", "shape": [1, 2]}), "neither of data and binary_data_size"),
    "both": (message(GOOD | {"parameters": {"binary_data_size": 8}}), "both data and binary_data_size"),
    "parameters of another type": (message(GOOD | {"parameters": [1]}), "expected an object"),
    "shared memory": (message(GOOD | {"parameters": {"shared_memory_region": "a"}}), "in shared memory"),
    "classification": (message(outputs=[{"name": "a", "parameters": {"classification": 3}}]), "classification"),
    "many outputs": (message(outputs=[{"name": "a"}] * 100), "found 100 outputs"),
    "outputs of another type": (message(outputs=["a"]), "found 'a' as an output"),
    "id of another type": (message(id=7), "found id 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_message_that_is_none_is_refused(name):
    body, expected = BAD[name]
    with pytest.raises(InputError, match=expected) as error:
        parse_request(body, None, INPUTS)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        (*binary(-8), "binary_data_size -8; expected 0 to 8"),
        (*binary(16), "binary_data_size 16; expected 0 to 8"),
        (*binary(2**63), "binary_data_size 9223372036854775808"),
        (*binary(7), "found x with 7 bytes; expected a multiple of 4"),
        (*binary(4), "found x with 1 numbers"),
        (*binary(8, bytes(9)), "found 1 bytes more than the inputs say"),
        (*binary(True), "found binary_data_size True"),
        (*binary(8, shape=(2**39, 2)), "found x with 2 numbers"),
        (binary(8)[0], "99999", "Content-Length 99999 and a body of"),
        (binary(8)[0], "-1", "expected a number of bytes"),
        (binary(8)[0], "1e3", "expected a number of bytes"),
        (binary(8)[0], "9" * 5000, "expected a number of bytes"),
        (binary(8)[0], "²", "expected a number of bytes"),
        (binary(8)[0], "0", "not JSON"),
        (binary(8)[0], None, "not JSON"),
    ],
)
def test_binary_sizes_that_lie_are_refused(body, length, message):
    with pytest.raises(InputError, match=message):
        parse_request(body, length, INPUTS)


def test_booleans_of_other_bytes_are_true():
    text = json.dumps(
        {"inputs": [{"name": "y", "datatype": "BOOL", "shape": [3], "parameters": {"binary_data_size": 3}}]}
    )
    found = parse_request(text.encode() + b"\0\1\xff", str(len(text)), INPUTS).tensors["y"]
    assert found.tolist() == [False, True, True] and found.view(np.uint8).max() == 1


def test_refusal_of_a_large_message_shows_little_of_it():
    body = message(GOOD | {"data": {"a": list(range(300_000))}})
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        parse_request(body, None, INPUTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(error.value)) < 300 and peak < 100 * 2**20


def test_numbers_that_json_lacks_are_refused_in_json_only():
    outputs = {"a": np.array([[np.nan, np.inf]], np.float32)}
    asks = [parse_request(message(parameters={"binary_data_output": binary}), None, (X,)) for binary in (False, True)]
    with pytest.raises(InputError, match=r"not finite.*ask for binary_data"):
        make_response("m", asks[0], outputs)
    body, length = make_response("m", asks[1], outputs)
    np.testing.assert_array_equal(np.frombuffer(body[length:], np.float32), outputs["a"][0])


def test_output_with_too_many_numbers_for_json_is_refused():
    asked = parse_request(message(), None, (X,))
    with pytest.raises(InputError, match=r"a has 2097153 numbers; .*: ask for binary_data"):
        make_response("m", asked, {"a": np.zeros(2**21 + 1, np.float32)})


def test_config_has_no_batch_in_its_dims_if_that_is_open():
    fixed = Tensor(name="x", dtype=np.dtype(np.float32), shape=(4, 2))
    assert model_config("m", "p", 8, INPUTS, (X,))["input"] == [
        {"name": "x", "data_type": "TYPE_FP32", "dims": [2]},
        {"name": "y", "data_type": "TYPE_BOOL", "dims": [3], "optional": True},
    ]
    found = model_config("m", "p", 4, (fixed,), (fixed,))
    assert found["max_batch_size"] == 0 and found["input"][0]["dims"] == [4, 2]


@given(st.binary(max_size=300), st.one_of(st.none(), st.text(max_size=4)))
def test_random_bytes_end_in_one_error(data, length):
    with pytest.raises(InputError):
        parse_request(data, length, INPUTS)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["x", "y", "FP32", "BOOL"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size"]), inner
        )
    ),
    max_leaves=12,
)


@given(
    JSON,
    st.sampled_from(["name", "datatype", "shape", "data", "parameters"]),
    st.sampled_from(["inputs", "outputs", "id"]),
)
def test_messages_with_other_values_end_in_one_error_or_in_arrays(value, key, field):
    for body in (message(GOOD | {key: value}), message(**{field: value}), message(outputs=[{key: value}])):
        try:
            found = parse_request(body, None, INPUTS)
        except InputError:
            continue
        assert all(isinstance(array, np.ndarray) for array in found.tensors.values())
