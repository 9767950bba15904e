"""What `ipfs` is on the command line, as far as hfms runs it, over a real node's RPC ($IPFS_TEST_API).

Options are read as go-ipfs-cmds reads them: what begins with `-` is one until `--`, and an unknown one is an error.
"""

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request

COMMANDS = {
    **dict.fromkeys(("version", "cat", "block get", "pin add", "pin rm", "dag export"), ()),
    "dag import": ("pin-roots",),
}


def main(words: list[str]) -> int:
    options, arguments = {}, []
    while words:
        word = words.pop(0)
        if word == "--":
            arguments += words
            break
        if word.startswith("-"):
            name, _, value = word.lstrip("-").partition("=")
            options[name] = value
        else:
            arguments.append(word)
    command = " ".join(arguments[:1] if arguments[0] in COMMANDS else arguments[:2])
    rest = arguments[len(command.split()) :]
    unknown = [n for n in options if n not in ("timeout", *COMMANDS.get(command, ()))]
    if command not in COMMANDS or unknown or len(rest) > 1:
        print(f"Error: unknown command or option: {command} {unknown} {rest}", file=sys.stderr)
        return 1
    query = urllib.parse.urlencode(options | ({"arg": rest[0]} if rest else {}))
    body, headers = b"", {}
    if command == "dag import":
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n'
        body = head + b"Content-Type: application/octet-stream\r\n\r\n" + sys.stdin.buffer.read() + b"\r\n--x--\r\n"
        headers["Content-Type"] = "multipart/form-data; boundary=x"
    url = f"{os.environ['IPFS_TEST_API']}/api/v0/{command.replace(' ', '/')}?{query}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers, method="POST")) as answer:
            while chunk := answer.read(2**16):
                sys.stdout.buffer.write(chunk)
    except urllib.error.HTTPError as exc:
        print("Error:", json.loads(exc.read())["Message"], file=sys.stderr)
        return 1
    return 0


sys.exit(main(sys.argv[1:]))
