/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * names: what both ends call things, and the limits both ends keep. The interfaces themselves are
 * described by the XML files here, which the tests compare with what the daemon serves.
 */

#define LLM_BUS_NAME "org.llmd.Llm1"
#define LLM_ROOT_PATH "/org/llmd/Llm1"
#define LLM_SESSION_PATH "/org/llmd/Llm1/session" /* then "/N" */
#define LLM_MODEL_PATH "/org/llmd/Llm1/model"     /* then "/NAME" as sd_bus_path_encode() has it */
#define LLM_MANAGER_INTERFACE "org.llmd.Llm1.Manager"
#define LLM_SESSION_INTERFACE "org.llmd.Llm1.Session"
#define LLM_MODEL_INTERFACE "org.llmd.Llm1.Model"
#define LLM_ERROR_PREFIX "org.llmd.Llm1.Error."

/* polkit's actions. */
#define LLM_ACTION_USE "org.llmd.Llm1.use"
#define LLM_ACTION_USE_BACKGROUND "org.llmd.Llm1.use-background"
#define LLM_ACTION_MANAGE_MODELS "org.llmd.Llm1.manage-models"
#define LLM_ACTION_INSPECT_SESSIONS "org.llmd.Llm1.inspect-sessions"
#define LLM_ACTION_MANAGE_QUOTAS "org.llmd.Llm1.manage-quotas"

/* The system service's directory, and its socket's name there; the user service's socket has the
 * same name within the runtime directory. */
#define LLM_SYSTEM_RUNTIME_DIR "/run/llmd"
#define LLM_SOCKET "llmd.socket"

/* The private daemon's socket within the runtime directory (ipc/runtime-dir.h). */
#define LLM_PRIVATE_SOCKET "private.sock"

/* One prompt, in bytes: a string, all messages together, or what a memfd holds. */
#define LLM_PROMPT_BYTES_MAX (8u * 1024 * 1024)
#define LLM_MESSAGES_MAX 4096u
#define LLM_LABEL_BYTES_MAX 64u
#define LLM_STOP_MAX 16u
#define LLM_STOP_BYTES_MAX 256u
#define LLM_LOGIT_BIAS_MAX 1024u
#define LLM_TOP_LOGPROBS_MAX 64u
