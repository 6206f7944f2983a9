"""A collector of traces: takes OTLP over gRPC and over HTTP, and prints every span as a line of JSON.

The first line has the two ports. Requests without the header `x-collector: s3cret` are refused. Ends with its input.
"""

import json
import sys
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.trace.v1 import trace_pb2

SECRET = "s3cret"
PRINTING = Lock()


def say(what):
    with PRINTING:
        print(json.dumps(what), flush=True)


def attributes(pairs):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def take(request, protocol):
    for resource in request.resource_spans:
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            say({
                "protocol": protocol,
                "resource": attributes(resource.resource.attributes),
                "name": span.name,
                "kind": trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                "trace": span.trace_id.hex(),
                "span": span.span_id.hex(),
                "parent": span.parent_span_id.hex(),
                "ended": span.end_time_unix_nano >= span.start_time_unix_nano > 0,
                "error": span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                "message": span.status.message,
                "attributes": attributes(span.attributes),
            })


class Grpc(service.TraceServiceServicer):
    def Export(self, request, context):
        if dict(context.invocation_metadata()).get("x-collector") != SECRET:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no x-collector")
        take(request, "grpc")
        return messages.ExportTraceServiceResponse()


class Http(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        good = self.path == "/v1/traces" and self.headers["x-collector"] == SECRET
        if good:
            take(messages.ExportTraceServiceRequest.FromString(body), "http")
        answer = messages.ExportTraceServiceResponse().SerializeToString()
        self.send_response(200 if good else 401)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


grpc_server = grpc.server(futures.ThreadPoolExecutor(2))
service.add_TraceServiceServicer_to_server(Grpc(), grpc_server)
grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
grpc_server.start()
http_server = ThreadingHTTPServer(("127.0.0.1", 0), Http)
Thread(target=http_server.serve_forever, daemon=True).start()
say({"grpc": grpc_port, "http": http_server.server_port})
sys.stdin.read()
