/** Progress of something countable: a bar drawn in place on a terminal, elsewhere a plain line every 10 %. */
export class Progress {
  readonly #what: string
  readonly #total: number
  readonly #started = performance.now()
  readonly #inPlace = process.stdout.isTTY === true
  #done = 0
  #drawnAt = 0
  #tenthsSaid = 0

  constructor(what: string, total: number) {
    this.#what = what
    this.#total = total
    if (this.#inPlace) this.#draw()
  }

  add(count: number): void {
    this.#done += count
    const tenths = Math.floor((this.#done * 10) / this.#total)
    if (this.#inPlace) {
      const now = performance.now()
      if (now - this.#drawnAt > redrawMillis || this.#done === this.#total) this.#draw()
      if (this.#done === this.#total) process.stdout.write("\n")
    } else if (tenths > this.#tenthsSaid) {
      this.#tenthsSaid = tenths
      console.log(`${this.#what}: ${tenths * 10} %, ${this.#figures()}`)
    }
  }

  /** Leaves the bar as it is, for a message on the next line. */
  stop(): void {
    if (this.#inPlace) process.stdout.write("\n")
  }

  #draw(): void {
    this.#drawnAt = performance.now()
    const filled = Math.floor((this.#done * barWidth) / this.#total)
    const bar = "█".repeat(filled) + "░".repeat(barWidth - filled)
    const line = `${this.#what} ${bar} ${this.#figures()}`
    process.stdout.write(`\r\x1b[K${line.slice(0, (process.stdout.columns ?? 80) - 1)}`)
  }

  #figures(): string {
    const seconds = (performance.now() - this.#started) / 1_000
    const rate = this.#done / seconds
    const left =
      this.#done === this.#total ? `${seconds.toFixed(1)} s` : `${Math.ceil((this.#total - this.#done) / rate)} s left`
    const counted = `${number(this.#done)} of ${number(this.#total)}`
    return this.#done === 0 ? counted : `${counted}, ${number(Math.round(rate))}/s, ${left}`
  }
}

const barWidth = 24
const redrawMillis = 100

const number = (value: number): string => value.toLocaleString("en-US")
