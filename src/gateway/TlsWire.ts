/**
 * TLS in process, with ALPN for HTTP/2 and HTTP/1.1. The certificate is read again when its files change or the process is
 * sent SIGHUP: connections that stand keep theirs. What cannot be used is left where it is, and the old one serves on.
 */
import { createPrivateKey, X509Certificate } from "node:crypto"
import { readFile } from "node:fs/promises"
import type { Socket } from "node:net"
import * as Tls from "node:tls"
import { Data, Effect } from "effect"
import type { SettingValues } from "../config.ts"

/** Certificate or key cannot be used. `message` is one line for people. */
export class TlsError extends Data.TaggedError("TlsError")<{ readonly message: string }> {}

export interface TlsWire {
  /** Speaks TLS on a connection of which nothing has been read, or what was read has been put back. */
  readonly accept: (socket: Socket) => void
}

export interface TlsHandlers {
  /** `http2` as agreed in the handshake. */
  readonly onSecure: (socket: Tls.TLSSocket, http2: boolean) => void
  readonly onFault: () => void
}

/** Nothing where neither `tlsCert` nor `tlsKey` is set. Reloads for as long as the scope is open. */
export const make = Effect.fnUntraced(function* (settings: SettingValues, handlers: TlsHandlers) {
  const { tlsCert, tlsKey } = settings
  if (tlsCert === "" && tlsKey === "") return undefined
  if (tlsCert === "" || tlsKey === "") {
    const missing = tlsCert === "" ? "--tls-cert" : "--tls-key"
    return yield* new TlsError({ message: `TLS needs a certificate and its key: ${missing} is not set.` })
  }
  const files = { certificate: tlsCert, key: tlsKey }
  let pem = yield* read(files)
  const server = Tls.createServer({
    ...(yield* usable(files, pem)),
    ALPNProtocols: ["h2", "http/1.1"],
    minVersion: "TLSv1.2",
    handshakeTimeout: settings.sniffTimeoutMillis
  })
  server.on("secureConnection", (socket) => {
    socket.setNoDelay(true)
    handlers.onSecure(socket, socket.alpnProtocol === "h2")
  })
  server.on("tlsClientError", (_, socket) => {
    handlers.onFault()
    socket.destroy()
  })

  let failed = ""
  const reload = Effect.gen(function* () {
    const next = yield* read(files)
    if (next.cert === pem.cert && next.key === pem.key) return
    server.setSecureContext({ ...(yield* usable(files, next)), minVersion: "TLSv1.2" })
    pem = next
    failed = ""
    yield* Effect.logInfo("TLS certificate reloaded", validity(next.cert))
  }).pipe(
    Effect.catch((error) =>
      Effect.suspend(() => {
        // Two files are not written at once: the first look may find one of them alone.
        if (failed === error.message) return Effect.void
        failed = error.message
        return Effect.logWarning("TLS certificate not reloaded", error.message)
      })
    )
  )
  const run = Effect.runForkWith(yield* Effect.context<never>())
  const onHangup = () => run(reload)
  yield* Effect.acquireRelease(
    Effect.sync(() => {
      process.on("SIGHUP", onHangup)
      const timer = setInterval(onHangup, reloadMillis)
      timer.unref()
      return timer
    }),
    (timer) =>
      Effect.sync(() => {
        clearInterval(timer)
        process.off("SIGHUP", onHangup)
      })
  )
  return { accept: (socket) => void server.emit("connection", socket) } satisfies TlsWire
})

/** Milliseconds between two looks at the files. */
const reloadMillis = 5_000

interface Files {
  readonly certificate: string
  readonly key: string
}

interface Pem {
  readonly cert: string
  readonly key: string
}

const read = (files: Files): Effect.Effect<Pem, TlsError> => {
  const file = (what: string, path: string) =>
    Effect.tryPromise({
      try: () => readFile(path, "utf8"),
      catch: (error) =>
        new TlsError({ message: `The TLS ${what} ${path} cannot be read: ${(error as NodeJS.ErrnoException).code}.` })
    })
  return Effect.all({ cert: file("certificate", files.certificate), key: file("key", files.key) })
}

/** The same, once it is sure that a server can be run with them. */
const usable = (files: Files, pem: Pem): Effect.Effect<Pem, TlsError> =>
  Effect.suspend(() => {
    const fault = (message: string) => Effect.fail(new TlsError({ message }))
    let certificate: X509Certificate
    try {
      certificate = new X509Certificate(pem.cert)
    } catch {
      return fault(`${files.certificate} is no certificate in PEM.`)
    }
    try {
      const key = createPrivateKey(pem.key)
      if (!certificate.checkPrivateKey(key)) {
        return fault(`The TLS key ${files.key} is not that of the certificate ${files.certificate}.`)
      }
    } catch {
      return fault(`${files.key} is no private key in PEM without a passphrase.`)
    }
    try {
      Tls.createSecureContext(pem)
    } catch (error) {
      return fault(`The TLS certificate ${files.certificate} cannot be used: ${(error as Error).message}.`)
    }
    return Effect.succeed(pem)
  })

const validity = (cert: string) => {
  const { subject, validTo } = new X509Certificate(cert)
  return { subject, valid_to: validTo }
}
