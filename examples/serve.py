"""Serve guided decoding: POST /generate answers with JSON, or with "stream": true as server-sent events.

A client that hangs up frees its slot. A list of prompts gets a list of answers. Each piece of a stream has an "index",
which says whose text it continues.

    pip install starlette uvicorn
    python examples/serve.py [BASE [ARM ...]]
    curl -N localhost:8000/generate -d '{"prompt": "How was the film?", "weights": [1.0], "stream": true}'
"""

import json
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from genarm_fast import GenARM, GenerationError, demo


def make_app(model: GenARM) -> Starlette:
    async def chunks(stream):
        try:
            async for chunk in stream:  # if the client hangs up, this loop is cancelled
                piece = {"index": chunk.index, "text": chunk.text, "finish_reason": chunk.finish_reason}
                yield f"data: {json.dumps(piece)}\n\n"
        except GenerationError as error:
            yield f"data: {json.dumps({'error': str(error)})}\n\n"

    async def whole(stream):
        try:
            async for _ in stream:
                pass
            outputs = [output.to_dict() for output in stream.outputs]
            yield json.dumps(outputs[0] if len(outputs) == 1 else outputs)
        except GenerationError as error:
            yield json.dumps({"error": str(error)})

    async def generate(request):
        try:
            body = dict(await request.json())
            shown, prompt = body.pop("stream", False), body.pop("prompt")
            stream = model.astream(prompt, ahead=8 if shown else 10**9, **body)
            await stream.__aenter__()  # checks the arguments, so that an error is raised before a status is sent
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 400)
        kind = "text/event-stream" if shown else "application/json"
        return StreamingResponse((chunks if shown else whole)(stream), media_type=kind)

    return Starlette(routes=[Route("/generate", generate, methods=["POST"])])


if __name__ == "__main__":
    base, *arms = sys.argv[1:] or [demo.base(), demo.arm("small")]
    uvicorn.run(make_app(GenARM.from_pretrained(base, arms, warm_up=True)))
