import { embed } from "../embed.mjs"

/**
 * The vector of a task.
 * @param {{ readonly title: string }} task
 */
export const embedTask = async (task) => embed(task.title)
