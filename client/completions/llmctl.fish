# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
# fish completion for llmctl(1). Names of sessions and models are asked of the daemon that the
# command line means; none is started for that.

# The commands given so far ("session create"), options left out.
function __fish_llmctl_command
    set -l found
    set -l skip no
    for word in (commandline -opc)[2..-1]
        if test $skip = yes
            set skip no
            continue
        end
        switch $word
            case --socket --session --timeout --label --class --context --model --name \
                    --instructions --max-tokens --temperature --top-k --top-p --min-p \
                    --repetition-penalty --presence-penalty --frequency-penalty \
                    --penalty-last-n --seed --stop --top-logprobs --jobs -j --rounds -n --delay -d \
                    --max-sessions --max-queued --max-kv-bytes --weight --tokens-per-minute
                # -n is run's --no-stdin, too, which has no value
                if test $word = -n; and not contains -- top $found
                    continue
                end
                set skip yes
            case '-*'
            case '*'
                set -a found $word
                if not contains -- $found[1] session model quota; or test (count $found) -eq 2
                    break
                end
        end
    end
    echo "$found"
end

function __fish_llmctl_in
    contains -- (__fish_llmctl_command) $argv
end

# llmctl with what says which daemon is meant.
function __fish_llmctl_ask
    set -l words (commandline -opc)
    set -l where (string match -r -- '^--(?:system|user|private|socket=.*)$' $words)
    set -l i (contains -i -- --socket $words)
    and set -a where --socket=$words[(math $i + 1)]
    $words[1] $where --timeout=2 --no-legend --no-pager --no-ask-password $argv </dev/null 2>/dev/null
end

function __fish_llmctl_sessions
    __fish_llmctl_ask session list | string replace -rf '^ *(\d+) +(\S+) .*' '$1\t$2'
end

function __fish_llmctl_models
    __fish_llmctl_ask model list | string replace -rf '^(\S+) +(\S+) .*' '$1\t$2'
end

complete -c llmctl -f

# ---- commands ----

set -l c complete -c llmctl -n "__fish_llmctl_in ''"
$c -a run -d 'answer one prompt'
$c -a chat -d 'hold a conversation'
$c -a map -d 'answer many inputs with one instruction'
$c -a measure -d 'count the tokens of a prompt'
$c -a cancel -d 'end what sessions are doing'
$c -a session -d 'conversations that outlive a program'
$c -a model -d 'the models that the daemon has'
$c -a quota -d 'what users may take of the daemon'
$c -a status -d 'tell what the daemon does'
$c -a top -d 'show what it does as it goes'
$c -a monitor -d 'print what happens to sessions and models'
$c -a is-ready -d 'tell by the exit status whether it answers'
$c -l version -d 'print the version and exit'

set -l c complete -c llmctl -n '__fish_llmctl_in session'
$c -a list -d 'list your sessions'
$c -a show -d 'tell all about sessions'
$c -a create -d 'make one that stays, and print its number'
$c -a fork -d 'copy one'
$c -a close -d 'end sessions'

set -l c complete -c llmctl -n '__fish_llmctl_in model'
$c -a list -d 'list the models that the daemon has'
$c -a show -d 'tell all about models'
$c -a install -d 'give the daemon a model\'s file'
$c -a remove -d 'delete installed models'
$c -a default -d 'tell or change which one is loaded'

set -l c complete -c llmctl -n '__fish_llmctl_in quota'
$c -a show -d 'tell what a user may take, and takes'
$c -a set -d 'change what a user may take'

# ---- arguments ----

complete -c llmctl -a '(__fish_llmctl_sessions)' \
    -n "__fish_llmctl_in cancel 'session show' 'session close' 'session fork'"
complete -c llmctl -a '(__fish_llmctl_models)' \
    -n "__fish_llmctl_in 'model show' 'model remove' 'model default'"
complete -c llmctl -F -n "__fish_llmctl_in 'model install'"
complete -c llmctl -a '(__fish_complete_users)' -n "__fish_llmctl_in 'quota show' 'quota set'"

# ---- options ----

set -l c complete -c llmctl
$c -l system -d 'the system\'s daemon only'
$c -l user -d 'the user\'s daemon only'
$c -l private -d 'a private daemon of this user'
$c -l socket -rF -d 'the daemon that listens there'
$c -l session -xa '(__fish_llmctl_sessions)' -d 'the session that is meant'
$c -l json -fa 'short pretty off' -d 'JSON on standard output'
$c -l no-pager -d 'do not page long lists'
$c -l no-legend -d 'no headings and sums around lists'
$c -s q -l quiet -d 'no notes on standard error'
$c -l no-ask-password -d 'never ask for authorisation'
$c -l timeout -x -d 'give up after that time'
$c -s h -l help -d 'print help and exit'

set -l c complete -c llmctl -n '__fish_llmctl_in run chat map'
$c -l max-tokens -x -d 'most tokens of an answer'
$c -l temperature -x -d '0: always the most probable token'
$c -l top-k -x -d 'draw among the k most probable tokens'
$c -l top-p -x -d 'draw from the smallest set of this probability'
$c -l min-p -x -d 'drop tokens less probable than this share'
$c -l repetition-penalty -x -d 'divide the logit of tokens seen'
$c -l presence-penalty -x -d 'lower the logit of tokens seen'
$c -l frequency-penalty -x -d 'lower it for each occurrence'
$c -l penalty-last-n -x -d 'tokens that the penalties look back'
$c -l seed -x -d 'the same answer again'
$c -l deterministic -d 'computed on one device only'
$c -l stop -x -d 'end before this text'
$c -l logprobs -d 'each token\'s log-probability'
$c -l top-logprobs -x -d 'and so many alternatives'
$c -l ignore-end -d 'go on past the end of the answer'

set -l c complete -c llmctl -n '__fish_llmctl_in run chat map measure'
$c -l instructions -x -d 'how to answer, for the model'
$c -l raw -d 'prompts as they are, without chat template'

set -l c complete -c llmctl -n "__fish_llmctl_in run chat map measure 'session create'"
$c -l model -rFa '(__fish_llmctl_models)' -d 'the model that must answer'
$c -l no-start -d 'do not start a daemon'

complete -c llmctl -n "__fish_llmctl_in run chat map 'session create'" -l context -x \
    -d 'tokens the conversation may hold'
complete -c llmctl -n "__fish_llmctl_in run chat map 'session create' 'session fork'" -l class \
    -xa 'interactive batch idle' -d 'who goes first'
complete -c llmctl -n "__fish_llmctl_in 'session create' 'session fork'" -l label -x \
    -d 'how lists call it'
complete -c llmctl -n '__fish_llmctl_in run measure' -s n -l no-stdin \
    -d 'do not read standard input'

complete -c llmctl -n '__fish_llmctl_in chat map' -s 0 -l null \
    -d 'NUL in the place of line feeds'
complete -c llmctl -n '__fish_llmctl_in chat' -l no-history -d 'do not keep what is typed'

set -l c complete -c llmctl -n '__fish_llmctl_in map'
$c -s j -l jobs -x -d 'answers in the making at a time'
$c -l unordered -d 'print each answer when it is there'
$c -l fail-fast -d 'stop at the first input that fails'
$c -l keep-going -d 'go on with the others'

complete -c llmctl -n "__fish_llmctl_in cancel 'session list' monitor top" -s a -l all \
    -d 'all sessions, not single ones'

set -l c complete -c llmctl -n "__fish_llmctl_in 'model install'"
$c -l name -x -d 'how to call it'
$c -l default -d 'the one to be loaded from now on'
$c -l replace -d 'in the place of one that has this name'

set -l c complete -c llmctl -n "__fish_llmctl_in 'quota set'"
$c -l max-sessions -x -d 'sessions at a time'
$c -l max-queued -x -d 'requests that wait at a time'
$c -l max-kv-bytes -x -d 'of the KV cache'
$c -l weight -x -d 'share of the time'
$c -l tokens-per-minute -x -d '0: no limit'

set -l c complete -c llmctl -n '__fish_llmctl_in top'
$c -s 1 -l once -d 'print it once'
$c -s n -l rounds -x -d 'so many times'
$c -s d -l delay -x -d 'time between two of them'

complete -c llmctl -n '__fish_llmctl_in is-ready' -s w -l wait \
    -d 'wait until it has loaded its model'
