"""The routes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gemma_mtp.async_engine import AsyncEngine
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.errors import GemmaMtpError
from gemma_mtp.model import Asked, Draft
from gemma_mtp.server import openai
from gemma_mtp.server.answering import Answering, Asking
from gemma_mtp.server.anthropic import AnthropicWriter
from gemma_mtp.server.choices import Writer
from gemma_mtp.server.errors import ApiError, api_error, invalid
from gemma_mtp.server.gate import Gate
from gemma_mtp.server.messages import CountBody, MessagesBody
from gemma_mtp.server.metrics import Metrics
from gemma_mtp.server.openai import ChatForm, CompletionForm, Echo, Form, OpenAIWriter, Spelling, now
from gemma_mtp.server.page import add_page
from gemma_mtp.server.responses import ResponsesBody
from gemma_mtp.server.responses_writer import ResponsesWriter
from gemma_mtp.server.schema import ChatBody, Common, CompletionBody, DetokenizeBody, TokenizeBody

DEFAULT_COMPLETION = 16  # tokens of a completion that does not say how many, as OpenAI has it
MAX_BODY = 4 << 20  # bytes
PREPARING = 2  # threads that make requests ready: each keeps the most memory that it ever took

_log = logging.getLogger("gemma_mtp")


def create_app(
    engine: AsyncEngine,
    name: str,
    *,
    keys: Collection[str] = (),
    max_body: int = MAX_BODY,
    max_prompt: int | None = None,
) -> FastAPI:
    """The server as an ASGI application. name: the model's, for clients. Shutting it down drains and closes the engine.

    keys: API keys that are let in; none: everyone is. max_body: the most bytes of a request.
    max_prompt: the most tokens of a prompt; None: as many as the context holds.
    """
    model, metrics, started = engine.model, Metrics(engine), now()
    answering = Answering(engine, metrics, max_prompt)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not model.has_chat_template:
            _log.warning("%s brings no chat template: conversations are written in Gemma's plain turns.", name)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(PREPARING, "prepare"))
        yield
        await engine.close()

    app = FastAPI(title="gemma-mtp", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, keys=keys, max_body=max_body)
    _answer_errors(app)
    add_page(app)

    def check_model(body: Common | ResponsesBody | CountBody | TokenizeBody | DetokenizeBody) -> None:
        if body.model is not None and body.model != name:
            message = f"There is no model '{body.model}' here: this server runs '{name}'."
            raise ApiError(404, message, param="model", code="model_not_found")

    def writer(form: Form, body: Common) -> Writer:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return OpenAIWriter(
            form,
            name,
            stream=body.stream,
            per_prompt=body.choices,
            with_usage=with_usage,
            with_timings=body.timings_per_token,
            with_ids=body.return_token_ids,
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        check_model(body)
        top = (body.top_logprobs or 0) if body.logprobs else None
        limit = body.max_completion_tokens or body.max_tokens or model.context
        messages = [message.plain() for message in body.messages]
        settings = body.sampling(limit, 0 if top is None else max(top, 1))
        asking = Asking(
            [(messages, params) for params in settings],
            body.drafting,
            body.declared_tools,
            body.forced_choice,
            body.parallel_tool_calls is not False,
            body.thinking,
            body.predicted,
        )
        asked = await answering.prepare(asking)
        ends = frozenset() if body.ignore_eos else asked[0].ends
        form: Form = ChatForm(Spelling(model.tokenizer, ends), top)
        return await answering.answer(writer(form, body), asked, request)

    @app.post("/v1/responses")
    async def responses(body: ResponsesBody, request: Request) -> Response:
        check_model(body)
        asking = Asking(
            [(body.conversation, body.sampling(model.context))],
            body.draft,
            body.declared_tools,
            body.forced_choice,
            body.parallel_tool_calls is not False,
            body.thinks,
        )
        asked = await answering.prepare(asking)
        return await answering.answer(ResponsesWriter(name, bool(body.stream), body.echoed()), asked, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        check_model(body)
        settings = body.sampling(
            DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens,
            0 if body.logprobs is None else max(body.logprobs, 1),
            of_prompt=bool(body.echo),
        )
        answering.check_count(len(body.prompts) * body.choices)
        asking = Asking([(prompt, params) for prompt in body.prompts for params in settings], body.drafting)
        asked = await answering.prepare(asking)
        ends = frozenset() if body.ignore_eos else asked[0].ends
        form: Form = CompletionForm(Spelling(model.tokenizer, ends), body.logprobs, echoes(body, asked))
        return await answering.answer(writer(form, body), asked, request)

    def echoes(body: CompletionBody, asked: Sequence[Asked]) -> list[Echo]:
        if not body.echo:
            return []
        prompts = [prompt for prompt in body.prompts for _ in range(body.choices)]
        return [openai.echo(model.tokenizer, prompt, one.ids) for prompt, one in zip(prompts, asked, strict=True)]

    async def prepared(body: CountBody, params: SamplingParams, draft: Draft) -> list[Asked]:
        check_model(body)
        tools = (body.declared_tools, body.forced_choice, body.several_calls)
        return await answering.prepare(Asking([(body.conversation, params)], draft, *tools, body.thinks))

    @app.post("/v1/messages")
    async def messages(body: MessagesBody, request: Request) -> Response:
        asked = await prepared(body, body.sampling, body.draft)
        return await answering.answer(AnthropicWriter(name, body.stream), asked, request)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountBody) -> dict[str, int]:
        (asked,) = await prepared(body, SamplingParams(), "off")
        return {"input_tokens": len(asked.ids)}

    def described() -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "gemma-mtp",
            "max_model_len": model.context,
            "drafter": model.drafter_name,
            "chat_template": model.has_chat_template,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{id:path}")
    async def model_of(id: str) -> dict[str, Any]:
        if id != name:
            raise ApiError(404, f"There is no model '{id}' here: this server runs '{name}'.", code="model_not_found")
        return described()

    @app.post("/tokenize")
    def tokenize(body: TokenizeBody) -> dict[str, Any]:
        check_model(body)
        tokens = model.tokenizer.encode(body.text, bos=body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": model.context}

    @app.post("/detokenize")
    def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        check_model(body)
        text = model.tokenizer.decode(body.tokens)
        return {"prompt": text, "content": text}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "running": engine.running, "waiting": engine.waiting}

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> Response:
        return invalid(error).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def of_route(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"There is nothing at {request.url.path}.",
            405: f"{request.method} is not what {request.url.path} takes.",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message).response(request.url.path)

    async def of_ours(request: Request, error: Exception) -> Response:
        return api_error(error).response(request.url.path)

    app.add_exception_handler(ApiError, of_ours)
    app.add_exception_handler(GemmaMtpError, of_ours)
    app.add_exception_handler(Exception, of_ours)
