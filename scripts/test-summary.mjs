// Prints one plain line about a test run from the result that vitest wrote as JSON, for those that read logs:
//
//   tests: 123 passed, 0 failed, 0 skipped
//
// Fails if a test failed, if none ran, or if there is no result to read; with RUVECTOR_CI set, also if one was skipped.
//
//   node scripts/test-summary.mjs RESULT.json

import { readFileSync } from "node:fs"

/** @typedef {{ status: "passed" | "failed" | "skipped" | "pending" | "todo" | "disabled", fullName: string }} Test */
/** @typedef {{ status: "passed" | "failed", assertionResults: Array<Test> }} File */

/** @type {{ success: boolean, testResults: Array<File> }} */
let result
try {
  result = JSON.parse(readFileSync(process.argv[2] ?? "", "utf8"))
} catch (error) {
  process.stderr.write(`the tests left no result: ${error instanceof Error ? error.message : error}\n`)
  process.exit(1)
}

const tests = result.testResults.flatMap((file) => file.assertionResults)
const passed = tests.filter(({ status }) => status === "passed").length
// A file that could not be loaded, or failed outside its tests, has no failed test to show for it.
const brokenFiles = result.testResults.filter(
  (file) => file.status === "failed" && file.assertionResults.every(({ status }) => status !== "failed")
).length
const failed = tests.filter(({ status }) => status === "failed").length + brokenFiles
const skipped = tests.length + brokenFiles - passed - failed

process.stdout.write(`tests: ${passed} passed, ${failed} failed, ${skipped} skipped\n`)
if (passed + failed === 0) process.stderr.write("no test ran\n")
if (failed > 0 || passed === 0 || !result.success) process.exitCode = 1

if (process.env["RUVECTOR_CI"] && skipped > 0) {
  for (const { fullName, status } of tests) {
    if (status !== "passed" && status !== "failed")
      process.stderr.write(`${status}, though nothing may be: ${fullName}\n`)
  }
  process.exitCode = 1
}
