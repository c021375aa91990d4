// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
//
// llama.cpp's side of bench-peers, which copies this file beside the package:
//   node bench-peers.mjs GGUF THREADS PROMPT DECODE SESSIONS SHORT_PROMPT
// Prints one JSON object; rates in tokens per second.
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [path, ...numbers] = process.argv.slice(2);
const [threads, nPrompt, nDecode] = numbers.slice(0, 3).map(Number);
const sessions = numbers[3].split(",").filter(Boolean).map(Number);
const nShort = Number(numbers[4]);

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error, maxThreads: threads,
});
const model = await llama.loadModel({modelPath: path, useMmap: true, gpuLayers: 0});

// Ordinary tokens, other ones in each session, so that nothing is shared.
function prompt(n, session) {
    return Array.from({length: n}, (_, k) => 1000 + ((k * 7919 + session * 104729) % 100000));
}

async function withContext(n, nTokens, use) {
    const context = await model.createContext({
        sequences: n, contextSize: nTokens + nDecode + 16, batchSize: 512, threads,
    });
    const result = await use(Array.from({length: n}, () => context.getSequence()));
    await context.dispose();
    return result;
}

function seconds(since) {
    return (performance.now() - since) / 1000;
}

// Each takes nDecode tokens after its first one, greedily, all at the same time.
async function decode(sequences) {
    let begun = 0;
    await Promise.all(sequences.map(async (sequence, i) => {
        let n = 0;
        for await (const token of sequence.evaluate([1000 + i], {temperature: 0, yieldEogToken: true})) {
            if (n++ === 0) // the last one to begin starts the clock
                begun = performance.now();
            if (n > nDecode)
                break;
        }
    }));
    return sequences.length * nDecode / seconds(begun);
}

const result = {release: llama.llamaCppRelease.release, sessions: {}};
await withContext(1, nPrompt, async ([sequence]) => {
    const begin = performance.now();
    await sequence.evaluateWithoutGeneratingNewTokens(prompt(nPrompt, 0));
    result.prefill = nPrompt / seconds(begin);
    result.decode = await decode([sequence]);
});
for (const n of sessions) {
    result.sessions[n] = await withContext(n, nShort, async (sequences) => {
        await Promise.all(sequences.map((s, i) => s.evaluateWithoutGeneratingNewTokens(prompt(nShort, i))));
        return decode(sequences);
    });
}
console.log(JSON.stringify(result));
process.exit(0); // handles of the library keep the process alive
