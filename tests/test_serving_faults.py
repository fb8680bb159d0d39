"""Bad requests, bad clients, files that are replaced, a server that is stopped: one clear answer each, and nobody else notices."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import SHAPES
from served import SECONDS, in_process, in_thread, read_all, request, until

import fusenms

pytestmark = pytest.mark.usefixtures("shared_exports")

IMAGE = (SHAPES / "shapes0.jpg").read_bytes()
SIZE = 64


@pytest.fixture(scope="module")
def file(tmp_path_factory, shared_exports):
    fused = fusenms.fuse(SHAPES / "shapes.pt", size=SIZE, unverified=True)
    return fused.save(tmp_path_factory.mktemp("file") / "shapes.ort.onnx", unverified=True)


@pytest.fixture(scope="module")
def strict(file):
    """A file that finds next to nothing."""
    fused = fusenms.fuse(SHAPES / "shapes.pt", size=SIZE, score_threshold=0.999, unverified=True)
    return fused.save(file.with_name("strict.ort.onnx"), unverified=True)


@pytest.fixture(scope="module")
def served(file):
    with in_thread(file, max_body=100_000) as server:
        yield server


@contextmanager
def held(server):
    """The model of a server does not run until it is told to, by the event that is given; the list has how many images each run had."""
    detector, go, runs = server.model().detector, threading.Event(), []
    run = detector.run

    def late(prepared):
        runs.append(len(prepared))
        assert go.wait(SECONDS)
        return run(prepared)

    detector.run = late
    try:
        yield go, runs
    finally:
        go.set()
        del detector.run


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status", "message"),
    [
        ("POST", "/detect/shapes", IMAGE, "text/plain", 415, "found Content-Type 'text/plain'"),
        ("POST", "/detect/shapes", IMAGE, "multipart/form-data; boundary=a", 415, "and the body alone"),
        ("POST", "/detect/shapes", IMAGE, "application/x-www-form-urlencoded", 415, "expected image/jpeg"),
        ("POST", "/v2/models/shapes/infer", b"{}", "image/jpeg", 415, "expected application/json"),
        ("POST", "/detect/shapes", b"", "image/jpeg", 400, "not a readable image (0 bytes)"),
        ("POST", "/detect/shapes", b"hello", "image/jpeg", 400, "not a readable image"),
        ("POST", "/detect/shapes", IMAGE[:-200], "image/jpeg", 400, "not a readable image"),
        ("POST", "/detect/shapes", b"\x00" * 100_001, "image/jpeg", 413, "100001 bytes; expected at most 100000"),
        ("POST", "/detect/other", IMAGE, "image/jpeg", 404, "found the model 'other'; expected one of shapes"),
        ("POST", "/detect/" + "x" * 5000, IMAGE, "image/jpeg", 404, "found the model"),
        ("POST", "/detect/%1b%5b31m%0a", IMAGE, "image/jpeg", 404, r"found the model '\\x1b[31m\\n'"),
        ("POST", "/detect/", IMAGE, "image/jpeg", 404, "found POST /detect/"),
        ("PUT", "/detect/shapes", IMAGE, "image/jpeg", 405, "found PUT /detect/shapes"),
        ("GET", "/v2/models/other/ready", None, "", 404, "found the model 'other'"),
        ("GET", "/v2/models/shapes/versions/2", None, "", 404, "found version '2'"),
        ("POST", "/v2/models/shapes/infer", b"\xff\xfe", "application/json", 400, "not JSON"),
    ],
)  # fmt: skip
def test_bad_request_gets_an_answer_that_says_why(served, method, path, body, kind, status, message):
    found, headers, answer = served.call(method, path, body, {"Content-Type": kind})
    assert found == status, answer
    assert message in json.dumps(json.loads(answer), ensure_ascii=False)
    assert headers["content-type"] == "application/json"
    assert served.model().queued == 0


def test_body_over_the_limit_is_refused_before_it_is_sent(served):
    head = b"POST /detect/shapes HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999999\r\n\r\n"
    with served.connect() as connection:
        connection.sendall(head)
        assert connection.recv(9999).startswith(b"HTTP/1.1 413 ")


@pytest.mark.slow
@pytest.mark.parametrize("first", [b"", b"Expect: 100-continue\r\n"])
def test_body_in_chunks_over_the_limit_is_refused_while_it_is_sent(served, first):
    chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
    with served.connect() as connection:
        connection.sendall(
            b"POST /detect/shapes HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + first + b"\r\n"
        )
        for _ in range(12):
            connection.sendall(chunk)
        answer = read_all(connection)  # also the server closes, though the body has not ended
    assert b"HTTP/1.1 413 " in answer and b"more than 100000 bytes" in answer


def test_client_that_still_sends_gets_the_answer(served):
    """The server takes in what is on its way, else the answer would be lost."""
    status, answer = served.post("/detect/shapes", bytes(20_000_000), "image/jpeg")
    assert status == 413 and "20000000 bytes" in answer["error"]


def test_much_json_is_refused_but_tensors_in_binary_are_not(file):
    images = np.zeros((1, 3, SIZE, SIZE), np.float32)
    entry = {
        "name": "images",
        "datatype": "FP32",
        "shape": list(images.shape),
        "parameters": {"binary_data_size": images.nbytes},
    }
    head = json.dumps({"inputs": [entry]}).encode()
    with in_thread(file, max_json=1000) as served:
        status, answer = served.post("/v2/models/shapes/infer", tensors(images))
        assert status == 413 and "expected at most 1000: send tensors in binary" in answer["error"]
        length = {"Inference-Header-Content-Length": str(len(head))}
        assert served.post("/v2/models/shapes/infer", head + images.tobytes(), **length)[0] == 200


def test_compressed_body_is_refused(served):
    status, answer = served.post("/detect/shapes", IMAGE, **{"Content-Encoding": "gzip"})
    assert status == 415 and "found a body with Content-Encoding 'gzip'" in answer["error"]


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense\r\n\r\n",
        b"POST /detect/shapes HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /detect/shapes HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /detect/shapes HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"\x00" * 100,
    ],
)
def test_what_is_not_http_is_closed(served, head):
    with served.connect() as connection:
        try:
            connection.sendall(head)
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # it was closed already
            pass
        answer = read_all(connection)
    assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 501")
    assert served.get("/v2/health/live")[0] == 200


def test_full_queue_is_answered_at_once(file):
    with in_thread(file, max_queue=8, batch_size=4) as served, held(served) as (go, _), ThreadPoolExecutor(8) as pool:
        taken = [pool.submit(served.post, "/detect/shapes", IMAGE) for _ in range(8)]
        until(lambda: served.model().queued == 8, "8 images wait")
        for path in ("/detect/shapes", "/v2/models/shapes/infer"):
            status, headers, answer = served.call("POST", path, IMAGE, {"Content-Type": "application/octet-stream"})
            assert status == 503 and headers["retry-after"] == "1" and "try again" in json.loads(answer)["error"]
        assert served.get("/v2/health/ready")[0] == 200 and served.metric('fusenms_queue_images{model="shapes"}') == 8
        go.set()
        assert [future.result()[0] for future in taken] == [200] * 8
        until(lambda: served.model().queued == 0, "the queue empties")
        assert served.post("/detect/shapes", IMAGE)[0] == 200


def test_tensors_count_as_many_images_in_the_queue(file):
    with in_thread(file, max_queue=8) as served, held(served) as (go, _), ThreadPoolExecutor(1) as pool:
        taken = pool.submit(served.post, "/detect/shapes", IMAGE)
        until(lambda: served.model().queued == 1, "an image waits")
        body = tensors(np.zeros((8, 3, SIZE, SIZE), np.float32))
        assert served.post("/v2/models/shapes/infer", body)[0] == 503
        go.set()
        assert taken.result()[0] == 200
        until(lambda: served.model().queued == 0, "the queue empties")
        assert served.post("/v2/models/shapes/infer", body)[0] == 200


def tensors(images):
    inputs = [{"name": "images", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}]
    return json.dumps({"inputs": inputs}).encode()


def test_requests_of_a_run_share_it(file):
    with in_thread(file) as served, held(served) as (go, runs), ThreadPoolExecutor(9) as pool:
        taken = [pool.submit(served.post, "/detect/shapes", IMAGE) for _ in range(9)]
        until(lambda: served.model().queued == 9 and bool(runs), "9 images wait")
        until(lambda: served.model().waiting == 9 - runs[0], "those that do not run wait for the next batch")
        go.set()
        assert all(future.result()[0] == 200 for future in taken)
        assert len(runs) == 2 + (runs[0] == 0) and sum(runs) == 9


def test_client_that_goes_away_costs_nothing(file):
    """One goes in the middle of its body, one while its image waits; its image does not run, and others get their answers."""
    with in_thread(file, batch_size=1) as served, held(served) as (go, runs), ThreadPoolExecutor(2) as pool:
        with served.connect() as connection:
            connection.sendall(request("/detect/shapes", IMAGE)[:-100])
        first = pool.submit(served.post, "/detect/shapes", IMAGE)
        until(lambda: len(runs) == 1, "the first one runs")
        with served.connect() as connection:
            connection.sendall(request("/detect/shapes", IMAGE))
            until(lambda: served.model().waiting == 1, "its image waits")
        until(lambda: served.model().queued == 1, "it is given up")
        other = pool.submit(served.post, "/detect/shapes", IMAGE)
        until(lambda: served.model().waiting == 1, "the image of the other waits")
        go.set()
        assert first.result()[0] == other.result()[0] == 200 and len(runs) == 2
        route = 'fusenms_requests_total{model="shapes",route="detect",status='
        until(lambda: served.metric(f'{route}"499"}}') == 2, "both are counted")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /detect/shapes HTTP/1.1\r\nHost: a\r\nX-A: b",
        request("/detect/shapes", IMAGE)[:-100],
        b"POST /detect/shapes HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\nabc",
    ],
    ids=["nothing", "head", "body", "chunk"],
)  # fmt: skip
def test_slow_client_is_closed(file, sent):
    """A byte now and then does not help it."""
    with in_thread(file, read_timeout=0.4, keep_alive=0.4) as served, served.connect() as connection:
        connection.sendall(sent)
        connection.settimeout(0.1)
        start, answer = time.monotonic(), b""
        while time.monotonic() - start < SECONDS:
            try:
                part = connection.recv(9999)
                answer += part
                if not part:
                    break
            except TimeoutError:
                try:
                    connection.sendall(b"X" if sent else b"")
                except OSError:
                    break
            except ConnectionResetError:
                break
        else:
            pytest.fail("the connection stays open")
        if b"Length" in sent or b"chunked" in sent:
            assert answer.startswith(b"HTTP/1.1 408 ")
        assert served.post("/detect/shapes", IMAGE)[0] == 200


@pytest.mark.slow
def test_idle_connection_is_closed_and_a_slow_second_head_too(file):
    with in_thread(file, read_timeout=0.3, keep_alive=0.3) as served:
        for more in (b"", b"GET /v2 HTT"):
            with served.connect() as connection:
                connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n" + more)
                assert read_all(connection).endswith(b'{"live":true}')


@pytest.mark.slow
def test_answer_that_is_not_taken_ends(file):
    """An answer that is larger than what the system keeps for a client that reads nothing."""

    async def large(*_):
        return bytes(30_000_000)

    with in_thread(file, read_timeout=0.3, keep_alive=0.3) as served, socket.socket() as connection:
        served.model().detect = large
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((served.host, served.port))
        connection.sendall(request("/detect/shapes", IMAGE))
        until(lambda: served.metric("fusenms_open_connections") == 2, "it is connected, and so is this client")
        until(lambda: served.metric("fusenms_open_connections") == 1, "it is closed")


def test_too_many_connections_are_answered(file):
    with in_thread(file, max_connections=20) as served:
        idle = [served.connect() for _ in range(20)]
        try:
            with served.connect() as more:
                answer = read_all(more)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in answer and b"connections" in answer
        finally:
            for connection in idle:
                connection.close()
        until(lambda: alive(served), "there is room again")


def alive(served):
    try:
        return served.get("/v2/health/live")[0] == 200
    except (OSError, ValueError):
        return False


def test_too_many_bodies_are_refused(file):
    with in_thread(file, max_body=100_000, max_bodies=150_000) as served:
        with served.connect() as slow:
            slow.sendall(request("/detect/shapes", bytes(90_000))[:-1])
            body = bytes(90_000)
            until(lambda: served.post("/detect/shapes", body)[0] == 503, "both bodies do not fit")
        until(lambda: served.post("/detect/shapes", body)[0] == 400, "there is room again")


def test_model_that_fails_is_said_without_its_path(file, caplog):
    from fusenms.errors import RunError

    with in_thread(file) as served:

        def fails(prepared):
            raise RunError(f"{file}: does not run")

        served.model().detector.run = fails
        status, answer = served.post("/detect/shapes", IMAGE)
        assert status == 500 and answer["error"] == "shapes: the model fails; the log of the server says why"
        assert f"{file}: does not run" in caplog.text
        del served.model().detector.run
        assert served.post("/detect/shapes", IMAGE)[0] == 200


def replace(path, data):
    """Replace a file at once, as `save` does."""
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.rename(path)


def look(model):
    """What the watch does: a change that is still the same at the second look is taken."""
    model.look()
    model.look()


def test_replaced_file_is_served_once_it_is_whole(file, strict, tmp_path):
    path = tmp_path / "shapes.onnx"
    shutil.copy(file, path)
    with in_thread(path) as served, held(served) as (go, runs), ThreadPoolExecutor(1) as pool:
        before = pool.submit(served.post, "/detect/shapes", IMAGE)
        until(lambda: len(runs) == 1, "it runs in the old file")
        replace(path, strict.read_bytes())
        old = served.model().detector
        look(served.model())
        assert served.model().detector is not old
        assert served.post("/detect/shapes", IMAGE)[1]["detections"] == []
        go.set()
        assert len(before.result()[1]["detections"]) > 0
        until(lambda: old._runner is None, "the old file is closed")
        assert served.metric('fusenms_reloads_total{model="shapes",outcome="opened"}') == 1


@pytest.mark.parametrize("bad", ["cut", "empty", "missing", "image", "folder"])
def test_bad_file_does_not_replace_the_served_one(file, tmp_path, bad, caplog):
    path = tmp_path / "shapes.onnx"
    shutil.copy(file, path)
    with in_thread(path) as served:
        expected = served.post("/detect/shapes", IMAGE)
        path.unlink()
        if bad == "folder":
            path.mkdir()
        elif bad != "missing":
            replace(path, {"cut": file.read_bytes()[:5000], "empty": b"", "image": IMAGE}[bad])
        look(served.model())
        assert served.post("/detect/shapes", IMAGE) == expected
        for where in ("/v2/health/ready", "/v2/models/shapes/ready"):
            status, answer = served.get(where)
            assert status == 200 and "shapes.onnx" in json.dumps(answer), answer
        assert served.metric('fusenms_replacement_refused{model="shapes"}') == 1
        assert "the older one is served" in caplog.text
        look(served.model())  # it is not tried again
        assert served.metric('fusenms_reloads_total{model="shapes",outcome="refused"}') == 1
        if bad == "folder":
            path.rmdir()
        replace(path, file.read_bytes())
        look(served.model())
        assert served.get("/v2/health/ready") == (200, {"ready": True})
        assert served.metric('fusenms_replacement_refused{model="shapes"}') == 0


def test_file_that_still_changes_is_waited_for(file, strict, tmp_path):
    path = tmp_path / "shapes.onnx"
    shutil.copy(file, path)
    with in_thread(path) as served:
        old, data = served.model().detector, strict.read_bytes()
        with open(path, "wb") as slow:
            for start in range(0, len(data), len(data) // 3):
                slow.write(data[start : start + len(data) // 3])
                slow.flush()
                served.model().look()
                assert served.model().detector is old and not served.model().problem
        served.model().look()
        assert served.model().detector is not old and not served.model().problem


@pytest.mark.slow
def test_stopped_server_answers_what_it_has_taken(file, strict, tmp_path):
    path = tmp_path / "shapes.onnx"
    shutil.copy(file, path)
    flags = ("--threads", "1", "--batch-delay", "1500", "--batch-size", "16", "--watch", "0.05")
    with in_process(str(path), *flags) as served:
        replace(path, strict.read_bytes())
        until(lambda: served.metric('fusenms_reloads_total{model="shapes",outcome="opened"}') == 1, "it is replaced")
        taken = [served.connect() for _ in range(6)]
        for connection in taken:
            connection.sendall(request("/detect/shapes", IMAGE))
        late = served.connect()
        late.sendall(request("/detect/shapes", IMAGE)[:-100])
        until(lambda: served.metric('fusenms_queue_images{model="shapes"}') == 6, "6 images wait")
        served.process.send_signal(signal.SIGTERM)
        until(lambda: refused(served), "no more connections are taken")
        late.sendall(request("/detect/shapes", IMAGE)[-100:])
        for connection in (*taken, late):
            assert read_all(connection).startswith(b"HTTP/1.1 200 OK")
            connection.close()
        assert served.process.wait(SECONDS) == 0
        assert "Traceback" not in served.process.stderr.read()


def refused(served):
    try:
        served.connect().close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.slow
def test_stopped_server_does_not_wait_for_ever(file):
    with in_process(str(file), "--threads", "1", "--shutdown-timeout", "0.5", "--read-timeout", "1000") as served:
        slow = served.connect()
        slow.sendall(request("/detect/shapes", IMAGE)[:-100])
        until(lambda: served.metric("fusenms_open_connections") == 2, "it is connected, and so is this client")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(SECONDS) == 0
        slow.close()
