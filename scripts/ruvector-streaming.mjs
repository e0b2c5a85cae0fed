#!/usr/bin/env node
// The command `ruvector-streaming`, for a clone that `npm link` made known: the same as src/main.ts with its arguments.

import { launch } from "./run.mjs"

await launch("src/main.ts", process.argv.slice(2))
