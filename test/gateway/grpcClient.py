"""A client made by protoc from the .proto files, on grpcio. Prints what it saw as one line of JSON."""

import json
import sys
import threading

import grpc

sys.path.insert(0, sys.argv[2])
search_pb2, search_grpc = grpc.protos_and_services("ruvector/v1/vector_search.proto")
# Not as grpc/health/..., for `grpc` is the library.
sys.path.insert(0, sys.argv[2] + "grpc/health/v1")
health_pb2, health_grpc = grpc.protos_and_services("health.proto")

port = sys.argv[1]
seen = {}


def channel(**options):
    return grpc.insecure_channel(f"127.0.0.1:{port}", **options)


def outcome(call):
    try:
        results = [result.vector_id for result in call]
        return {"results": results, "partial": "ruvector-partial" in dict(call.trailing_metadata())}
    except grpc.RpcError as error:
        trailers = dict(error.trailing_metadata() or ())
        return {"status": error.code().name, "details": error.details(), "code": trailers.get("ruvector-code", "")}


with channel() as plain:
    stub = search_grpc.VectorSearchStub(plain)
    request = search_pb2.SearchRequest

    seen["search"] = outcome(stub.StreamSearch(request(query=[1, 0.1], k=2)))
    [first] = stub.StreamSearch(request(query_vector_id="v3", k=1, include_metadata=True, include_vector=True))
    seen["whole"] = [first.vector_id, json.loads(first.metadata), len(first.vector)]
    seen["refused"] = outcome(stub.StreamSearch(request(query=[1], k=-1)))
    seen["unknown"] = outcome(stub.StreamSearch(request(query=[1, 0], collection="n\u00fcmber")))
    seen["missing"] = outcome(stub.StreamSearch(request(query_vector_id="niemand-\u00fc")))
    # The client's own words for it differ from call to call.
    seen["deadline"] = outcome(stub.StreamSearch(request(query=[1, 0]), timeout=0))["status"]

    def requests():
        for i in range(100):
            yield request(query=[1, i / 100], k=3, request_id=f"r{i}")
        yield request(query=[1], k=1, request_id="bad")

    results = {}
    summaries = {}
    for message in stub.BidirectionalSearch(requests()):
        if message.HasField("summary"):
            summaries[message.request_id] = message.summary
        else:
            results.setdefault(message.request_id, []).append(message.vector_id)
    seen["many"] = [len(summaries), sum(len(found) for found in results.values())]
    seen["bad"] = [summaries["bad"].error.code, summaries["bad"].error.problem, summaries["bad"].error.field]
    seen["good"] = [summaries["r1"].HasField("error"), summaries["r1"].total_results]

    # A call held open, and cancelled.
    ended = threading.Event()

    def forever():
        yield request(query=[1, 0], k=1, request_id="one")
        ended.wait(10)

    held = stub.BidirectionalSearch(forever())
    seen["held"] = [next(held).vector_id, next(held).HasField("summary")]
    held.cancel()
    ended.set()
    seen["cancelled"] = held.code().name

    health = health_grpc.HealthStub(plain)
    check = health_pb2.HealthCheckRequest
    response = health_pb2.HealthCheckResponse
    seen["health"] = response.ServingStatus.Name(health.Check(check(service="ruvector.v1.VectorSearch")).status)
    watch = health.Watch(check())
    seen["watch"] = response.ServingStatus.Name(next(watch).status)
    watch.cancel()

for name in ("Gzip", "Deflate"):
    with channel(compression=getattr(grpc.Compression, name)) as packed:
        stub = search_grpc.VectorSearchStub(packed)
        call = stub.StreamSearch(request(query=[1, 0.1], k=50, include_metadata=True))
        found = list(call)
        seen[name] = [len(found), sorted({len(result.metadata) > 1000 for result in found})]

print(json.dumps(seen))
