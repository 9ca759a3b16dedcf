"""Start-up: the environment alone tells whether a machine is one of several. Together: test_multiprocess."""

import http.server
import socket
import threading

import jax
import pytest
from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.parallel import processes

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
    "TPU_SKIP_MDS_QUERY",
    "MEGASCALE_NUM_SLICES",
    "GCE_METADATA_IP",
)


@pytest.fixture
def alone(monkeypatch):
    """A machine that is told nothing; any look at the network is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return monkeypatch


@pytest.fixture
def joined(monkeypatch):
    """The arguments of calls of `jax.distributed.initialize`."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


@pytest.fixture
def tpu(monkeypatch):
    """The variables that JAX sets when it finds a TPU."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", before)


def test_a_machine_for_itself_joins_nobody_and_asks_nobody(alone, joined):
    processes.initialize()
    assert joined == []
    assert processes.process_count() == 1
    assert processes.gather("é") == ["é"] and processes.any_across_processes(True, False) == [True, False]
    processes.require_equal({"anything": 1}, "nothing to fix")
    processes.check_joined()


def test_alone_failures_keep_their_types_and_nothing_is_written(tmp_path):
    with pytest.raises(ZeroDivisionError):
        processes.run_on_all_processes(lambda: 1 // 0)
    processes.require_shared(epath.Path(tmp_path) / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"}, 16),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, 1),  # the batch script itself, which starts the tasks
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, 1),
        ({"JAX_NUM_PROCESSES": "3", "SLURM_STEP_NUM_TASKS": "16"}, 3),  # what was set by hand counts
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 1),  # but there is no TPU here
    ],
)
def test_the_environment_says_how_many_there_are(alone, environment, count):
    for name, value in environment.items():
        alone.setenv(name, value)
    assert processes.process_count() == count


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1,t-2,t-3"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "MEGASCALE_NUM_SLICES": "3"}, 6),
        ({"TPU_PROCESS_ADDRESSES": "t-0:1,t-1:1", "TPU_WORKER_HOSTNAMES": "t-0"}, 2),
        ({"TPU_SKIP_MDS_QUERY": "1"}, 1),
    ],
)
def test_a_tpu_in_kubernetes_is_told_by_its_environment(alone, tpu, environment, count):
    for name, value in environment.items():
        alone.setenv(name, value)
    assert processes.process_count() == count


@pytest.mark.parametrize(
    ("attributes", "count"),
    [
        ({"worker-network-endpoints": "unknown:0:10.0.0.1", "tpu-env": "TYPE: 'V5LITE_POD'\n"}, 1),
        ({"worker-network-endpoints": "unknown:0:10.0.0.1,unknown:1:10.0.0.2"}, 2),
        ({"worker-network-endpoints": "a,b", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"}, 4),
        ({}, 1),  # Colab
    ],
)
def test_a_tpu_virtual_machine_asks_its_metadata_server(monkeypatch, tpu, attributes, count):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            result = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(200 if result and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((result or "").encode())

        def log_message(self, *args):
            pass

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert processes.process_count() == count
        server.shutdown()
        thread.join()
    assert processes.process_count() == 1  # nobody answers any more


def test_what_is_set_by_hand_is_passed_on(alone, joined):
    alone.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    alone.setenv("JAX_NUM_PROCESSES", "4")
    alone.setenv("JAX_PROCESS_ID", "0")
    processes.initialize(patience_seconds=7)
    assert joined == [
        {
            "coordinator_address": "10.0.0.1:1234",
            "num_processes": 4,
            "process_id": 0,
            "cluster_detection_method": "deactivate",
            "heartbeat_timeout_seconds": 7,
            "shutdown_timeout_seconds": 7,
        }
    ]


def test_a_schedulers_is_left_to_jax(alone, joined):
    alone.setenv("SLURM_STEP_NUM_TASKS", "4")
    processes.initialize(patience_seconds=7)
    assert joined == [{"heartbeat_timeout_seconds": 7, "shutdown_timeout_seconds": 7}]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]),
        ({"JAX_NUM_PROCESSES": "2"}, ["JAX_COORDINATOR_ADDRESS is not"]),
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, ["JAX_PROCESS_ID is not"]),
        ({"JAX_NUM_PROCESSES": "two"}, ["JAX_NUM_PROCESSES='two'", "at least 1"]),
        ({"JAX_NUM_PROCESSES": "0"}, ["JAX_NUM_PROCESSES='0'", "at least 1"]),
        # This process has used a device, which must not come first.
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "1"},
            ["cannot join the 2 processes", "must be called before"],
        ),
    ],
)
def test_half_a_setting_is_refused(alone, environment, message):
    jax.devices()
    for name, value in environment.items():
        alone.setenv(name, value)
    with pytest.raises(UserError) as caught:
        processes.initialize()
    assert "\n" not in str(caught.value) and all(words in str(caught.value) for words in message), caught.value


def test_one_of_several_that_has_not_joined_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one of 4 processes.*runtime.initialize"):
        processes.check_joined()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (["a\nno", "b\nno"], "no"),
        (["", "b\nno"], "process 1 (b) of 2: no"),
        (["a\nno", "", "c\nfull"], "process 0 (a) of 3: no; process 2 (c) of 3: full"),
        (["", *(f"h{i}\nno" for i in range(5))], "process 1 (h0), 2 (h1), 3 (h2) and 2 more of 6: no"),
        (
            ["", *(f"h\n{i}" for i in range(5))],
            "process 1 (h) of 6: 0; process 2 (h) of 6: 1; process 3 (h) of 6: 2; and 2 more reasons",
        ),
    ],
)
def test_who_failed_and_why_is_one_line(message, line):
    assert processes._failures(message) == line


def test_a_probe_that_stays_behind_stops_nobody(tmp_path, monkeypatch, caplog):
    """Process 0 of two, which alone deletes it; the other says what it says."""
    directory = epath.Path(tmp_path) / "run"

    def refuse(path, *args, **named):
        raise PermissionError("may not delete")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda text: [text, text])
    monkeypatch.setattr(type(directory), "unlink", refuse)
    processes.require_shared(directory)
    assert "may not delete" in caplog.text and len(list(directory.iterdir())) == 1
