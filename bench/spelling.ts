/** Known words that are spelled nearly like an unknown one, nearest first; among equally near ones in the order given. */
export const nearestSpellings = (word: string, known: ReadonlyArray<string>, count: number): Array<string> => {
  const bound = Math.max(1, Math.floor(word.length / 3))
  const found = known.flatMap((other) => {
    const edits = editsBetween(word, other, bound)
    return edits > bound ? [] : [{ other, edits }]
  })
  return found
    .sort((a, b) => a.edits - b.edits)
    .slice(0, count)
    .map(({ other }) => other)
}

/** Letters inserted, removed, replaced, or swapped with their neighbour; anything above the bound counts as bound + 1. */
const editsBetween = (a: string, b: string, bound: number): number => {
  if (Math.abs(a.length - b.length) > bound) return bound + 1
  let beforeLast: Array<number> = []
  let last = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    let least = i
    for (let j = 1; j <= b.length; j++) {
      const same = a[i - 1] === b[j - 1]
      let edits = Math.min(at(last, j) + 1, at(row, j - 1) + 1, at(last, j - 1) + (same ? 0 : 1))
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1])
        edits = Math.min(edits, at(beforeLast, j - 2) + 1)
      row.push(edits)
      least = Math.min(least, edits)
    }
    if (least > bound) return bound + 1
    beforeLast = last
    last = row
  }
  return at(last, b.length)
}

const at = (row: ReadonlyArray<number>, index: number): number => row[index] as number
