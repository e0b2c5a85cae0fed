/** The server of `faultyServer.ts` as a process of its own, and what it is told. */
import { type ServerProcess, startServer } from "../support/ServerProcess.ts"
import type { FaultMessage } from "./faultyServer.ts"

const entry = new URL("./faultyServer.ts", import.meta.url).pathname

export const startFailingServer = (
  data: string,
  flags: ReadonlyArray<string>,
  environment: Record<string, string> = {}
): Promise<ServerProcess> => startServer(data, flags, environment, entry)

/** Until it holds, or the server is gone. */
export const tell = (server: ServerProcess, message: FaultMessage): Promise<void> =>
  new Promise((resolve) => {
    const gone = () => resolve()
    server.process.once("exit", gone)
    server.process.once("message", () => {
      server.process.off("exit", gone)
      resolve()
    })
    server.process.send(message, () => {})
  })
