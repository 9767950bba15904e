"""An hfms plugin: a middleware with an option, a verb of the command line, and a route of the server."""

from dataclasses import dataclass

from msgspec.structs import replace

from hfms_cli import Middleware, Provider, hookimpl, setting


@dataclass(frozen=True)
class ShoutOptions:
    suffix: str = setting("", "Added to the end of each answer.", env="SHOUT_SUFFIX")


class Shout(Middleware):
    def __init__(self, options):
        self.suffix = options.suffix

    async def call(self, call, proceed):
        async for chunk in proceed(call):
            ending = self.suffix if chunk.finish_reason else ""
            yield replace(chunk, text=chunk.text.upper() + ending)


@hookimpl
def hfms_middlewares():
    yield Provider("shout", Shout, ShoutOptions, summary="Every answer in capitals.")


@hookimpl
def hfms_commands(app):
    @app.command()
    def shout(text: str):
        """Print TEXT in capitals."""
        print(text.upper())


@hookimpl
def hfms_routes(app):
    from aiohttp import web

    async def shout(request):
        return web.json_response({"shout": request.match_info["text"].upper()})

    app.router.add_get("/shout/{text}", shout)
