# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
# bash completion for llmctl(1). Names of sessions and models are asked of the daemon that the
# command line means; none is started for that.

# llmctl as it is called here, with what says which daemon is meant.
__llmctl_ask() {
    local program=${COMP_WORDS[0]/#\~\//$HOME/} i where=()
    for ((i = 1; i < ${#COMP_WORDS[@]}; i++)); do
        case ${COMP_WORDS[i]} in
        --system | --user | --private) where+=("${COMP_WORDS[i]}") ;;
        --socket)
            if [[ ${COMP_WORDS[i + 1]} == = ]]; then
                where+=("--socket=${COMP_WORDS[i + 2]}")
            else
                where+=("--socket=${COMP_WORDS[i + 1]}")
            fi
            ;;
        esac
    done
    "$program" "${where[@]}" --timeout=2 --no-legend --no-pager --no-ask-password "$@" \
        </dev/null 2>/dev/null
}

__llmctl_sessions() {
    __llmctl_ask session list | while read -r id _; do echo "$id"; done
}

__llmctl_models() {
    __llmctl_ask model list | while read -r name _; do echo "$name"; done
}

_llmctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local verb='' command='' i word values='' files='' n_arguments=0

    local -r everywhere='--system --user --private --socket= --session= --json --no-pager
        --no-legend --quiet --no-ask-password --timeout= --help'
    local -r request='--instructions= --raw --max-tokens= --temperature= --top-k= --top-p= --min-p=
        --repetition-penalty= --presence-penalty= --frequency-penalty= --penalty-last-n= --seed=
        --deterministic --stop= --logprobs --top-logprobs= --ignore-end --context= --class= --model= --no-start'
    local -A options=(
        [llmctl]='--version'
        [run]="$request --no-stdin"
        [chat]="$request --null --no-history"
        [map]="$request --null --jobs= --unordered --fail-fast --keep-going"
        [measure]='--instructions= --raw --no-stdin --model= --no-start'
        [cancel]='--all'
        [session]=''
        ['session list']='--all'
        ['session show']=''
        ['session create']='--label= --class= --context= --model= --no-start'
        ['session fork']='--label= --class='
        ['session close']=''
        [model]=''
        ['model list']=''
        ['model show']=''
        ['model install']='--name= --default --replace'
        ['model remove']=''
        ['model default']=''
        [quota]=''
        ['quota show']=''
        ['quota set']='--max-sessions= --max-queued= --max-kv-bytes= --weight= --tokens-per-minute='
        [status]=''
        [top]='--all --once --rounds= --delay='
        [monitor]='--all'
        [is-ready]='--wait'
    )
    local -A commands=(
        [session]='list show create fork close'
        [model]='list show install remove default'
        [quota]='show set'
    )

    # bash takes --option=value apart at the =.
    if [[ $cur == = ]]; then
        cur=''
    elif [[ $prev == = ]]; then
        prev=${COMP_WORDS[COMP_CWORD - 2]}
    elif [[ $prev == --json ]]; then
        prev='' # takes a value after = only
    fi

    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
        =) i=$((i + 1)) ;;
        --*)
            if [[ " ${options[${verb:-llmctl}]-} $everywhere $request " == *[[:space:]]"$word= "* &&
                ${COMP_WORDS[i + 1]} != = ]]; then
                i=$((i + 1))
            fi
            ;;
        -*) ;;
        *)
            if [[ -z $verb ]]; then
                verb=$word command=$word
            elif [[ -n ${commands[$verb]-} && $command == "$verb" ]]; then
                command="$verb $word"
            else
                n_arguments=$((n_arguments + 1))
            fi
            ;;
        esac
    done

    COMPREPLY=()
    case $prev in
    --session) values=$(__llmctl_sessions) ;;
    --model) values=$(__llmctl_models) files=yes ;;
    --socket) files=yes ;;
    --json) values='short pretty off' ;;
    --class) values='interactive batch idle' ;;
    --*)
        if [[ " $everywhere ${options[${command:-llmctl}]-} " == *[[:space:]]"$prev="[[:space:]]* ]]; then
            return # a number or a text
        fi
        ;;&
    *)
        if [[ $cur == -* ]]; then
            values="$everywhere ${options[${command:-llmctl}]-}"
        elif [[ -z $verb ]]; then
            for word in "${!options[@]}"; do
                [[ $word == *' '* || $word == llmctl ]] || values+=" $word"
            done
        elif [[ -n ${commands[$verb]-} && $command == "$verb" ]]; then
            values=${commands[$verb]}
        else
            case $command in
            cancel | 'session show' | 'session close' | 'session fork') values=$(__llmctl_sessions) ;;
            'model show' | 'model remove' | 'model default') values=$(__llmctl_models) ;;
            'model install') files=yes ;;
            'quota show' | 'quota set')
                ((n_arguments > 0)) && [[ $command == 'quota set' ]] || values=$(compgen -u)
                ;;
            esac
        fi
        ;;
    esac

    local reply
    while read -r reply; do
        [[ -n $reply ]] && COMPREPLY+=("$reply")
    done < <(
        compgen -W "$values" -- "$cur"
        [[ -z $files ]] || compgen -f -- "$cur"
    )
    if [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
    elif [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace 2>/dev/null
    fi
}

complete -F _llmctl llmctl
