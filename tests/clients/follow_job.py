"""What a user of another language does: generate a client from proto/ with grpcio-tools, submit a job, follow its log.

Usage: follow_job.py ADDRESS PROTO_DIR. Prints the job's output; exits with the job's exit code, or 1 when a check fails.
"""

import sys
import tempfile
import uuid
from pathlib import Path

import grpc
from grpc_tools import protoc


def generate(proto_dir: Path, out: str) -> None:
    protos = sorted(str(path.relative_to(proto_dir)) for path in proto_dir.rglob("*.proto"))
    arguments = ["protoc", f"-I{proto_dir}", f"--python_out={out}", f"--grpc_python_out={out}", *protos]
    # Google's well-known types come with grpcio-tools.
    arguments.insert(1, f"-I{Path(protoc.__file__).parent / '_proto'}")
    if protoc.main(arguments) != 0:
        sys.exit("the contracts do not compile with protoc")


def main() -> int:
    address, proto_dir = sys.argv[1], Path(sys.argv[2])
    out = tempfile.TemporaryDirectory()
    generate(proto_dir, out.name)
    sys.path.insert(0, out.name)
    from blixard.common.v1 import job_pb2
    from blixard.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        scheduler = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        request_id = str(uuid.uuid4())
        spec = job_pb2.JobSpec(command=["sh", "-c", "echo from python; echo aside >&2; exit 3"])
        request = scheduler_pb2.SubmitJobRequest(request_id=request_id, spec=spec)
        first = scheduler.SubmitJob(request, timeout=30).job
        again = scheduler.SubmitJob(request, timeout=30).job
        assert first.id == again.id == request_id, "a repeated request must give the same job"

        request = scheduler_pb2.StreamJobLogsRequest(job_id=first.id, follow=True)
        next_offset, end = 0, None
        for record in scheduler.StreamJobLogs(request, timeout=120):
            kind = record.WhichOneof("record")
            if kind == "chunk":
                assert record.chunk.offset == next_offset, "offsets must follow one another"
                next_offset += len(record.chunk.data)
                stdout = record.chunk.stream == job_pb2.LOG_STREAM_STDOUT
                (sys.stdout if stdout else sys.stderr).buffer.write(record.chunk.data)
            elif kind == "end":
                end = record.end
        assert end is not None and end.end_offset == next_offset, "the log must end where its last byte is"
        assert end.state == job_pb2.JOB_STATE_FAILED, end
        return end.exit.exit_code


if __name__ == "__main__":
    sys.exit(main())
