/** Progress of a command on stderr: a bar drawn in place on a terminal, elsewhere a line every few seconds. */
export class ProgressLine {
  readonly #what: string
  readonly #inPlace = process.stderr.isTTY === true
  #drawnAt = performance.now()
  #drawn = false

  constructor(what: string) {
    this.#what = what
  }

  /** Counts in one unit, whatever it is. */
  readonly show = (done: number, total: number): void => {
    const now = performance.now()
    if (now - this.#drawnAt < (this.#inPlace ? redrawMillis : sayMillis)) return
    this.#drawnAt = now
    this.#drawn = true
    const share = total === 0 ? 1 : done / total
    const percent = `${Math.floor(share * 100)} %`
    if (!this.#inPlace) return void process.stderr.write(`${this.#what}: ${percent}\n`)
    const filled = Math.floor(share * barWidth)
    process.stderr.write(`\r\x1b[K${this.#what} ${"█".repeat(filled)}${"░".repeat(barWidth - filled)} ${percent}`)
  }

  /** Takes the bar away. */
  end(): void {
    if (this.#inPlace && this.#drawn) process.stderr.write("\r\x1b[K")
  }
}

const barWidth = 24
const redrawMillis = 100
const sayMillis = 3_000
