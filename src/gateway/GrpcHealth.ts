/** The methods of `grpc.health.v1.Health` on a call: the node's readiness, of the whole and of each of its services. */
import { InvalidInput, ShuttingDown } from "../protocol/Errors.ts"
import type { CallHandler, GrpcCall, Source } from "./GrpcCall.ts"
import { healthFrame, readHealthCheckRequest, type ServingStatus, servingStatus } from "./GrpcMessages.ts"
import { grpcMessage, grpcStatus, okTrailers, trailersOf } from "./GrpcStatus.ts"
import type { Readiness } from "./Readiness.ts"

export interface HealthHub {
  readonly readiness: Readiness["Service"]
  /** Names of services that can be asked for; the empty one is the whole node. */
  readonly services: ReadonlySet<string>
}

/** How it is now. */
export const healthCheck = (hub: HealthHub, call: GrpcCall): CallHandler =>
  oneRequest(call, (service) => {
    const status = statusNow(hub, service)
    if (status === servingStatus.serviceUnknown) {
      return call.failWith({
        "grpc-status": String(grpcStatus.notFound),
        "grpc-message": grpcMessage(`There is no service ${service}.`)
      })
    }
    call.sendLast(new StatusSource(status), okTrailers)
  })

/** How it is now, and each time that changes, until the node shuts down. */
export const healthWatch = (hub: HealthHub, call: GrpcCall): CallHandler & { readonly drain: () => void } => {
  let leave: (() => void) | undefined
  let waiting: StatusSource | undefined
  let service: string | undefined
  const tell = () => {
    const status = statusNow(hub, service as string)
    // A client that does not read is told the newest when it does, not all that was in between.
    if (waiting?.replace(status)) return
    waiting = new StatusSource(status)
    call.send(waiting)
  }
  const handler = oneRequest(call, (asked) => {
    service = asked
    leave = hub.readiness.onChange(tell)
    tell()
  })
  return {
    ...handler,
    onClose: () => leave?.(),
    drain: () => {
      leave?.()
      call.end(trailersOf(new ShuttingDown({ retryAfterMillis: 1_000 })))
    }
  }
}

const statusNow = ({ readiness, services }: HealthHub, service: string): ServingStatus => {
  if (service !== "" && !services.has(service)) return servingStatus.serviceUnknown
  return readiness.get().state === "ready" ? servingStatus.serving : servingStatus.notServing
}

const oneRequest = (call: GrpcCall, onService: (service: string) => void): CallHandler => {
  let asked = false
  return {
    onMessage: (bytes) => {
      if (asked) return call.fail(new InvalidInput({ field: "", expected: "one message", got: "more" }))
      asked = true
      const service = readService(bytes)
      if (service === undefined) {
        const expected = "a message grpc.health.v1.HealthCheckRequest"
        return call.fail(new InvalidInput({ field: "", expected, got: "bytes that are not one" }))
      }
      onService(service)
    },
    onEnd: () => {
      if (!asked) call.fail(new InvalidInput({ field: "", expected: "one message", got: "none" }))
    },
    onClose: () => {}
  }
}

const readService = (bytes: Buffer): string | undefined => {
  try {
    return readHealthCheckRequest(bytes)
  } catch {
    return undefined
  }
}

class StatusSource implements Source {
  readonly bytes = 0
  #status: ServingStatus
  #sent = false

  constructor(status: ServingStatus) {
    this.#status = status
  }

  /** `false`: too late, it is sent. */
  replace(status: ServingStatus): boolean {
    if (this.#sent) return false
    this.#status = status
    return true
  }

  next(): Buffer {
    this.#sent = true
    return healthFrame(this.#status)
  }

  done(): boolean {
    return this.#sent
  }
}
