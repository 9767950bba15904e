// An IPFS node on loopback, for tests: it knows nobody, and ends on SIGTERM.
// `node node.mjs REPO` prints a line of JSON once it answers: {"api": URL, "addresses": [...]}
import { create } from 'ipfs-core'
import { HttpApi } from 'ipfs-http-server'

const here = '/ip4/127.0.0.1/tcp/0'
const ipfs = await create({
  repo: process.argv[2],
  silent: true,
  preload: { enabled: false },
  init: { emptyRepo: true },
  libp2p: { peerDiscovery: [], connectionManager: { autoDial: false } },
  config: {
    Addresses: { Swarm: [here], API: here, Gateway: here, Announce: [], NoAnnounce: [], Delegates: [] },
    Bootstrap: [],
    Discovery: { MDNS: { Enabled: false }, webRTCStar: { Enabled: false } },
    Routing: { Type: 'none' },
    Pubsub: { Enabled: false }
  }
})
const api = new HttpApi(ipfs)
await api.start()
const { address, port } = api.apiAddr.nodeAddress()
const { addresses } = await ipfs.id()
console.log(JSON.stringify({ api: `http://${address}:${port}`, addresses }))
process.on('SIGTERM', async () => { await api.stop(); await ipfs.stop(); process.exit(0) })
