#!/usr/bin/env python3
"""A client that knows nothing but the .proto files talks to a router.

The code for the messages is generated from `proto/` into a temporary folder; everything else is plain grpcio. The
router's address comes from the environment: CONCLAVE_INFERENCE=host:port.

    CONCLAVE_INFERENCE=127.0.0.1:7400 .deps/python/bin/python tests/python/test_client.py
"""

import importlib
import os
import sys
import tempfile
import unittest
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as alpha
from grpc_status import rpc_status
from grpc_tools import protoc

PROTO = Path(__file__).parents[2] / "proto"
SERVICE = "conclave.inference.v1.Inference"
DEADLINE = 120.0
"""Seconds; generous, since a slow machine is no failure."""
# The v1 and v1alpha reflection protocols have the same messages under two names.
REFLECTION = {
    version: f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")
}


def generate(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Compiles the inference contract into `folder`; its messages and its stubs."""
    file = "conclave/inference/v1/inference.proto"
    arguments = ["protoc", f"-I{PROTO}", f"--python_out={folder}", f"--grpc_python_out={folder}", file]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc does not compile {file}")
    sys.path.insert(0, str(folder))
    name = file.removesuffix(".proto").replace("/", ".")
    return importlib.import_module(f"{name}_pb2"), importlib.import_module(f"{name}_pb2_grpc")


def bad_fields(error: grpc.RpcError) -> list[str]:
    """The field paths in the google.rpc.BadRequest of a status."""
    status = rpc_status.from_call(error)
    fields = []
    for detail in status.details if status else ():
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            fields += [violation.field for violation in request.field_violations]
    return fields


class Client(unittest.TestCase):
    """One channel to the router, shared by all tests."""

    @classmethod
    def setUpClass(cls) -> None:
        address = os.environ.get("CONCLAVE_INFERENCE", "").removeprefix("http://")
        if not address:
            raise RuntimeError("CONCLAVE_INFERENCE must be the router's host:port")
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.messages, stubs = generate(Path(folder.name))
        cls.channel = grpc.insecure_channel(address)
        cls.addClassCleanup(cls.channel.close)
        grpc.channel_ready_future(cls.channel).result(timeout=DEADLINE)
        cls.stub = stubs.InferenceStub(cls.channel)
        cls.model = cls.stub.GetModel(cls.messages.GetModelRequest(), timeout=DEADLINE)

    def request(self, count: int = 8, **more: Any) -> Any:
        """A greedy request for `count` tokens after a few token ids that every vocabulary has."""
        messages = self.messages
        ids = [token % self.model.vocab_size for token in (5, 11, 17, 23, 42)]
        fields = {
            "tokens": messages.TokenIds(ids=ids),
            "sampling": messages.SamplingParams(temperature=0.0),
            "stop": messages.StopParams(max_tokens=count, ignore_eos=True),
        }
        return messages.GenerateRequest(**(fields | more))

    def generate(self, request: Any) -> list[Any]:
        """All events of an answer."""
        return list(self.stub.Generate(request, timeout=DEADLINE))

    def drawn(self, events: Iterable[Any]) -> list[Any]:
        """The tokens in the events."""
        return [token for event in events for token in event.tokens.tokens]

    def failure(self, request: Any) -> grpc.RpcError:
        """The error which the request has to end with."""
        with self.assertRaises(grpc.RpcError) as caught:
            self.generate(request)
        return caught.exception

    def test_reflection_lists_the_services_in_both_versions(self) -> None:
        for version, method in REFLECTION.items():
            with self.subTest(version):
                call = self.channel.stream_stream(
                    method,
                    request_serializer=alpha.ServerReflectionRequest.SerializeToString,
                    response_deserializer=alpha.ServerReflectionResponse.FromString,
                )
                asked = iter([alpha.ServerReflectionRequest(list_services="")])
                answer = next(iter(call(asked, timeout=DEADLINE)))
                names = [service.name for service in answer.list_services_response.service]
                print(f"reflection {version}: {', '.join(sorted(names))}")
                self.assertIn(SERVICE, names)
                self.assertIn("grpc.health.v1.Health", names)

    def test_reflection_describes_the_messages(self) -> None:
        call = self.channel.stream_stream(
            REFLECTION["v1"],
            request_serializer=alpha.ServerReflectionRequest.SerializeToString,
            response_deserializer=alpha.ServerReflectionResponse.FromString,
        )
        asked = iter([alpha.ServerReflectionRequest(file_containing_symbol=SERVICE)])
        answer = next(iter(call(asked, timeout=DEADLINE)))
        self.assertTrue(answer.file_descriptor_response.file_descriptor_proto)

    def test_the_service_is_healthy(self) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=DEADLINE)
        self.assertEqual(answer.status, health_pb2.HealthCheckResponse.SERVING)

    def test_an_answer_is_started_then_tokens_then_finished(self) -> None:
        events = self.generate(self.request(count=8, request_id="python-client"))
        kinds = [event.WhichOneof("event") for event in events]
        self.assertEqual(kinds[0], "started")
        self.assertEqual(kinds[-1], "finished")
        self.assertEqual(set(kinds[1:-1]), {"tokens"})
        started, finished = events[0].started, events[-1].finished
        self.assertEqual(started.request_id, "python-client")
        self.assertEqual(started.prompt_tokens, 5)
        tokens = self.drawn(events)
        print(f"tokens: {[token.id for token in tokens]}")
        print(f"text: {''.join(token.text for token in tokens) + finished.trailing_text!r}")
        self.assertEqual(len(tokens), 8)
        self.assertTrue(all(token.id < self.model.vocab_size for token in tokens))
        self.assertEqual(finished.reason, self.messages.FINISH_REASON_LENGTH)
        self.assertEqual(finished.usage.prompt_tokens, 5)
        self.assertEqual(finished.usage.completion_tokens, 8)

    def test_the_same_greedy_request_gets_the_same_tokens(self) -> None:
        first, second = (self.drawn(self.generate(self.request())) for _ in range(2))
        self.assertEqual([token.id for token in first], [token.id for token in second])

    def test_logprobs_come_when_asked_for_and_only_then(self) -> None:
        for token in self.drawn(self.generate(self.request(count=3))):
            self.assertFalse(token.HasField("logprob"))
            self.assertEqual(len(token.top), 0)
        asked = self.messages.LogprobParams(sampled=True, top=3, prompt=True)
        events = self.generate(self.request(count=3, logprobs=asked))
        for token in self.drawn(events):
            self.assertLessEqual(token.logprob, 0.0)
            self.assertEqual(len(token.top), 3)
            self.assertEqual(token.top[0].id, token.id, "a greedy token is the most probable one")
            self.assertAlmostEqual(token.top[0].logprob, token.logprob, places=4)
            self.assertEqual([t.logprob for t in token.top], sorted((t.logprob for t in token.top), reverse=True))
        prompt = events[0].started.prompt_logprobs
        self.assertEqual(len(prompt), 5)
        self.assertFalse(prompt[0].HasField("logprob"), "nothing comes before the first token")
        self.assertTrue(all(token.HasField("logprob") for token in prompt[1:]))

    def test_a_field_out_of_range_is_named(self) -> None:
        error = self.failure(self.request(sampling=self.messages.SamplingParams(temperature=-1.0)))
        self.assertEqual(error.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertEqual(bad_fields(error), ["sampling.temperature"])
        print(f"temperature -1: {error.details()}")

    def test_a_token_outside_the_vocabulary_is_refused(self) -> None:
        tokens = self.messages.TokenIds(ids=[1, self.model.vocab_size])
        error = self.failure(self.request(tokens=tokens))
        self.assertEqual(error.code(), grpc.StatusCode.INVALID_ARGUMENT)
        fields = bad_fields(error)
        self.assertTrue(fields and all(field.startswith("tokens") for field in fields), fields)

    def test_another_models_name_is_not_found(self) -> None:
        error = self.failure(self.request(model="a-model-that-nobody-serves"))
        self.assertEqual(error.code(), grpc.StatusCode.NOT_FOUND)

    def test_a_cancelled_answer_ends_and_the_next_one_is_served(self) -> None:
        room = self.model.context_tokens - 5
        call = self.stub.Generate(self.request(count=min(room, 2000)), timeout=DEADLINE)
        for event in call:
            if event.WhichOneof("event") == "tokens":
                break
        call.cancel()
        with self.assertRaises(grpc.RpcError) as caught:
            list(call)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.CANCELLED)
        self.assertEqual(len(self.drawn(self.generate(self.request(count=2)))), 2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
