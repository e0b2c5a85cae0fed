/** A vector thread that dies when told so over a channel: by leaving, by an error nobody catches, or for want of memory. */
import "../../../src/tiers/vectorThread.ts"

const channel = new BroadcastChannel("mortal vector thread")

channel.onmessage = ({ data }: { readonly data: unknown }) => {
  if (data === "leave") process.exit(3)
  if (data === "throw") {
    setImmediate(() => {
      throw new Error("nobody catches this")
    })
  }
  if (data === "hoard") for (const kept: Array<Array<number>> = []; ; ) kept.push(new Array<number>(100_000).fill(0.5))
}
// The channel alone does not keep the thread alive.
;(channel as unknown as { unref(): void }).unref()
