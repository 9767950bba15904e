"""Who may call: keys of the configuration, keys of a store (`hfms keys`), and tokens of an identity provider.

keys.py        how a key is written, what is kept of it, what it permits
store.py       the contract of a store; sqlite.py, postgres.py (over sql.py) and redis.py fulfil it
keyring.py     every key in memory, never more than half a second behind the store
throttle.py    wrong keys cost time
oidc.py        tokens instead of keys
admin.py       create, show, revoke, rotate; audit.py notes who did
middleware.py  the door; routes.py and commands.py are the two ways to admin.py
"""

from __future__ import annotations
