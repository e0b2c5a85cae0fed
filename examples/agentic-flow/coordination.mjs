// @ts-nocheck: as it is written in the architecture document, section 10.1, but for the lines that import and export.
import { VectorDB } from 'ruvector-streaming';
import { AgenticFlow } from './AgenticFlow.ts';
import { embedTask } from './embedTask.mjs';

// Initialize distributed vector memory
const flow = new AgenticFlow({
  vectorStore: new VectorDB({
    endpoint: 'https://ruvector.example.com',
    region: 'auto', // auto-selects nearest region
    streaming: true,
  }),
  topology: 'mesh',
  coordinationHooks: {
    preTask: async (task) => {
      // Store task embedding for similarity search
      const embedding = await embedTask(task);
      await flow.vectorStore.insert(task.id, embedding, {
        metadata: { type: 'task', status: 'pending' }
      });
    },
    postTask: async (task, result) => {
      // Update task with result
      await flow.vectorStore.update(task.id, {
        metadata: { status: 'completed', result }
      });
    }
  }
});

// Distributed agent search for similar tasks
async function findSimilarTasks(currentTask) {
  const stream = flow.vectorStore.searchStream(
    currentTask.embedding,
    { k: 10, filter: { type: 'task' } }
  );

  for await (const result of stream) {
    console.log(`Similar task: ${result.id}, score: ${result.score}`);
  }
}

export { findSimilarTasks, flow };
