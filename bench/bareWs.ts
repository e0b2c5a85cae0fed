/**
 * The least that a WebSocket costs: `ws` on node:http, answering each message with a short text. Prints its port as a line
 * of JSON and ends when its standard input closes.
 */
import { createServer } from "node:http"
import type { AddressInfo } from "node:net"
import { WebSocketServer } from "ws"

const server = createServer()
const sockets = new WebSocketServer({ server, path: "/api/v1/ws", perMessageDeflate: false, clientTracking: false })
const answer = '{"event":"pong"}'
sockets.on("connection", (socket) => {
  socket.on("message", () => socket.send(answer))
  socket.on("error", () => {})
})
server.listen({ port: 0, host: "127.0.0.1", backlog: 4_096 }, () =>
  console.log(JSON.stringify({ port: (server.address() as AddressInfo).port }))
)
process.stdin.on("close", () => process.exit()).resume()
