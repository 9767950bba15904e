"""IPFS without a node: names, blocks, files and archives. Public, as `hfms_cli` itself is, for plugins that store.

cid        names, and the check of a block against its name
unixfs     files and folders as blocks;  shards: large folders;  build: from disk to blocks
car        many blocks in one stream;  cbor: its head
fetch      blocks from several sources, none of them believed
walk       from blocks to files and folders
store      the base class of stores
"""

from hfms_cli.ipfs.build import CHUNKER, Block, blocks_of_bytes, blocks_of_path, blocks_of_tree, chunk_size, root_of
from hfms_cli.ipfs.car import CarReader, car_header, car_section
from hfms_cli.ipfs.cid import CODECS, MAX_BLOCK, Cid, check, parse
from hfms_cli.ipfs.fetch import Fetch, Health, Source
from hfms_cli.ipfs.store import BlockStore
from hfms_cli.ipfs.walk import Entry, below

__all__ = [
    "CHUNKER",
    "CODECS",
    "MAX_BLOCK",
    "Block",
    "BlockStore",
    "CarReader",
    "Cid",
    "Entry",
    "Fetch",
    "Health",
    "Source",
    "below",
    "blocks_of_bytes",
    "blocks_of_path",
    "blocks_of_tree",
    "car_header",
    "car_section",
    "check",
    "chunk_size",
    "parse",
    "root_of",
]
