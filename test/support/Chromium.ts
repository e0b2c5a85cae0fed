/** Chromium for tests: Debian's, driven by playwright-core. */
import { accessSync, constants } from "node:fs"
import { type Browser, chromium } from "playwright-core"

const binary = (): string | undefined =>
  [process.env["CHROMIUM"] ?? "", "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(
    (path) => {
      try {
        accessSync(path, constants.X_OK)
        return path !== ""
      } catch {
        return false
      }
    }
  )

/** Whether tests in a browser are left out: with a line that says how to get one; never where all have to run. */
export const withoutChromium = (): boolean => {
  if (binary() !== undefined || process.env["RUVECTOR_CI"] !== undefined) return false
  console.warn("skipped, as there is no Chromium: apt-get install chromium, or CHROMIUM=<path>")
  return true
}

export const startChromium = async (): Promise<Browser> => {
  const executablePath = binary()
  if (executablePath === undefined)
    throw new Error("there is no Chromium: apt-get install chromium, or CHROMIUM=<path>")
  return chromium.launch({
    executablePath,
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync"
    ]
  })
}
